"""Tokenizers and the image processor do what the classes of `transformers` do, from every kind of file."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tests import tiny, tiny_video

from lowtide.configs import CheckpointError
from lowtide.models.image_processor import CLIPImageProcessor
from lowtide.models.tokenizers import CLIPTokenizer, T5Tokenizer, load_tokenizer
from lowtide.pipelines.base import DiffusionPipeline

KINDS = [(32, 126), (160, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFD), (0x1F300, 0x1F9FF)]
DICE = random.Random(1)
TEXTS = [
    "", "!", "A red panda", "the sea at night, 静か", "  leading   and\ttabs\nlines\r\n", "Émile’s naïve “quotes” …",
    "👩\u200d👩\u200d👧\u200d👦 family 🏳️ flag 🇩🇪", "it's they're I'll don't 'quoted'", "1234567890 3.14 1,000",
    "hello!world!!! ?? ## a_b", "<|endoftext|> in text <|startoftext|>", "<|ENDOFTEXT|>", "ﬁne ½ ① ™",
    "e\u0301 \u00a0 \u200b \u2028 \ufeff \x00", "مرحبا नमस्ते 한국어 𝔘𝔫𝔦", "İstanbul ß ẞ ſ", "sea " * 50, "a" * 400,
    "</w> </s> <pad> <unk> ▁ x", "the</s>sea", "<extra_id_0><extra_id_99>  <extra_id_100>", "a <cat> sea <dog>",
    *("".join(chr(DICE.randint(*DICE.choice(KINDS))) for _ in range(DICE.randint(1, 60))) for _ in range(200)),
]  # fmt: skip
CALLS = [
    {},
    {"padding": True},
    {"add_special_tokens": False},
    {"truncation": True, "max_length": 3},
    {"truncation": True, "padding": "max_length"},
    {"padding": "max_length", "max_length": 9, "truncation": True, "return_tensors": "pt"},
    {"truncation": True, "max_length": 5, "padding": "longest", "return_tensors": "pt"},
]
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "bos_token_id", "eos_token_id", "pad_token_id")
NORMALIZED = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write(folder, config=None, **files):
    """CLIP's byte pairs with entries of `tokenizer_config.json` changed, and other files."""
    tiny.write_tokenizer(folder)
    own = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, **(config or {})}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content, **entries):
    return {"content": content, **NORMALIZED, **entries}


def sd15(folder):
    start, end = ({**token(word), "__type": "AddedToken"} for word in (tiny.START, tiny.END))
    write(folder, {"bos_token": start, "eos_token": end, "unk_token": end, "errors": "replace"})
    (folder / "special_tokens_map.json").unlink()


def sd2(folder):
    start, end = token(tiny.START), token(tiny.END)
    write(folder, special_tokens_map={"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "!"})


def numbered(folder):
    words = {"0": ("!", False), "516": (tiny.START, True), "517": (tiny.END, True)}
    listed = {number: token(word, special=True, normalized=normal) for number, (word, normal) in words.items()}
    write(folder, {"pad_token": "!", "added_tokens_decoder": listed})


def saved_by_theirs(cls, write):
    def saved(folder):
        write(folder / "before")
        getattr(transformers, cls).from_pretrained(folder / "before").save_pretrained(folder)

    return saved


def stripping(folder):
    extra = {
        str(143 - n): token(f"<extra_id_{n}>", special=True, lstrip=True, rstrip=True, normalized=False)
        for n in range(100)
    }
    ends = {str(n): token(word, special=True, normalized=False) for n, word in enumerate(("<pad>", "</s>", "<unk>"))}
    tiny_video.write_pieces(folder, added_tokens_decoder={**ends, **extra})


def bare(folder):
    tiny_video.write_pieces(folder, additional_special_tokens=None, extra_ids=None)
    (folder / "special_tokens_map.json").unlink()


FILES = {
    "byte pairs": ("CLIPTokenizer", tiny.write_tokenizer),
    "as in version 1.5": ("CLIPTokenizer", sd15),
    "as in version 2": ("CLIPTokenizer", sd2),
    "numbered tokens": ("CLIPTokenizer", numbered),
    "added tokens": ("CLIPTokenizer", lambda folder: write(folder, added_tokens={"<cat>": 518, "<dog>": 519})),
    "padded on the left": ("CLIPTokenizer", lambda folder: write(folder, {"padding_side": "left"})),
    "byte pairs saved": ("CLIPTokenizer", saved_by_theirs("CLIPTokenizer", sd2)),
    "pieces": ("T5Tokenizer", tiny_video.write_pieces),
    "bare pieces": ("T5Tokenizer", bare),
    "tokens that strip": ("T5Tokenizer", stripping),
    "T5's json": ("T5Tokenizer", tiny_video.write_tokenizer_json),
    "pieces saved": ("T5Tokenizer", saved_by_theirs("T5Tokenizer", tiny_video.write_pieces)),
}


@pytest.mark.parametrize("kind", FILES)
def test_texts_become_the_same_tokens_and_texts_again(tmp_path, kind):
    class_name, write_files = FILES[kind]
    write_files(tmp_path)
    ours, theirs = load_tokenizer(tmp_path, class_name), getattr(transformers, class_name).from_pretrained(tmp_path)
    for call in CALLS:
        here, there = ours(TEXTS, **call), theirs(TEXTS, verbose=False, **call)
        for name in ("input_ids", "attention_mask"):
            assert (
                torch.equal(*(torch.as_tensor(x) for x in (here[name], there[name])))
                if "return_tensors" in call
                else (here[name] == there[name])
            ), call
    for text in TEXTS:
        ids = theirs(text, verbose=False).input_ids
        assert ours(text).input_ids == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.batch_decode(torch.tensor([[3, 4]])) == theirs.batch_decode(torch.tensor([[3, 4]]))
    assert {name: getattr(ours, name) for name in NAMES} == {name: getattr(theirs, name) for name in NAMES}
    assert (len(ours), ours.vocab_size, ours.get_vocab()) == (len(theirs), theirs.vocab_size, theirs.get_vocab())
    assert ours.model_max_length == theirs.model_max_length
    assert set(ours.all_special_tokens) >= set(theirs.all_special_tokens)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_saved_is_read_here_and_there(tmp_path, kind):
    class_name, write_files = FILES[kind]
    write_files(tmp_path / "files")
    tokenizer = load_tokenizer(tmp_path / "files", class_name)
    tokenizer.save_pretrained(tmp_path / "saved")
    expected = tokenizer(TEXTS, padding=True).input_ids
    for other in (type(tokenizer), getattr(transformers, class_name)):
        again = other.from_pretrained(tmp_path / "saved")
        assert again(TEXTS, padding=True).input_ids == expected
        assert again.model_max_length == tokenizer.model_max_length


def test_a_tokenizer_as_scripts_use_it(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path)
    assert isinstance(tokenizer, CLIPTokenizer)
    inputs = tokenizer("sea", return_tensors="pt", padding="max_length").to("cpu", torch.float16)
    assert inputs.input_ids.shape == (1, tiny.MAX_TOKENS)
    assert inputs.input_ids.dtype == torch.long
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert tokenizer.tokenize("sea boat")[0] == "sea</w>"
    assert tokenizer.encode("sea") == [516, tokenizer.convert_tokens_to_ids("sea</w>"), 517]
    assert tokenizer.convert_ids_to_tokens([516]) == [tiny.START]
    assert tokenizer.convert_tokens_to_ids("none") == tokenizer.unk_token_id == 517
    assert tokenizer.all_special_ids == [516, 517]
    assert tokenizer.sep_token is None
    assert tokenizer.add_tokens(["<boat>"]) == 1
    assert tokenizer("<boat>").input_ids == [516, 518, 517]
    assert CLIPTokenizer.from_pretrained(tmp_path, model_max_length=9).model_max_length == 9
    for call, said in (
        ({"padding": "some"}, "padding='some' is not possible"),
        ({"return_tensors": "tf"}, "return_tensors='tf' is not possible"),
        ({"return_tensors": "pt"}, "different lengths"),
        ({"truncation": True, "max_length": 1}, "max_length=1 is not possible: there are 2 special tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            tokenizer(["sea", "a boat"], **call)
    with pytest.raises(ValueError, match="reads text, not a int"):
        tokenizer([3])
    with pytest.raises(AttributeError, match="no attribute 'chat_template'"):
        _ = tokenizer.chat_template


def test_merges_that_are_no_pairs(tmp_path):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nonly\n")
    with pytest.raises(CheckpointError, match=r"merges.txt: 'only' is no pair"):
        load_tokenizer(tmp_path, "CLIPTokenizer")


def test_pieces_without_an_unknown_one(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x03\x0a\x01a")
    with pytest.raises(CheckpointError, match=r"spiece.model: no SentencePiece model.*no unknown piece"):
        load_tokenizer(tmp_path, "T5Tokenizer")


def test_pipelines_have_them(tmp_path):
    loaded = DiffusionPipeline.from_pretrained(tiny_video.write_checkpoint(tmp_path / "model"))
    assert type(loaded.tokenizer) is T5Tokenizer


# ---- pictures for the safety checker

ENTRIES = [
    {},
    {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 24}},
    {"size": 18, "crop_size": 31},
    {"size": {"height": 20, "width": 30}, "resample": 2, "crop_size": {"height": 9, "width": 9}},
    {"do_resize": False, "crop_size": {"height": 40, "width": 12}, "rescale_factor": 0.01},
    {"do_normalize": False},
    {"do_center_crop": False, "size": {"height": 8, "width": 9}, "do_rescale": False},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 17}, "crop_size": 5},
]


@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_pictures_become_the_same_numbers(tmp_path, entries):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    processors = transformers.models.clip
    theirs = (getattr(processors, "CLIPImageProcessorPil", None) or processors.CLIPImageProcessor).from_pretrained(
        tmp_path
    )
    ours = CLIPImageProcessor.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again, crossed = (
        CLIPImageProcessor.from_pretrained(tmp_path / "saved"),
        type(theirs).from_pretrained(tmp_path / "saved"),
    )
    dice = np.random.default_rng(1)
    for height, width in ((32, 32), (21, 45), (50, 13)):
        picture = Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = theirs([picture, picture], return_tensors="pt").pixel_values
        for other in (ours, again, crossed):
            assert torch.equal(other([picture, picture], return_tensors="pt").pixel_values, expected)
    grey = Image.fromarray(dice.integers(0, 256, (21, 45), dtype=np.uint8))
    assert np.array_equal(ours(grey).pixel_values[0], theirs(grey).pixel_values[0])


def test_sides_that_are_not_possible(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 20}}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: .*shortest_edge, or height and width"):
        CLIPImageProcessor.from_pretrained(tmp_path)
