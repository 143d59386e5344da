"""T5 as a text encoder: its weights in every layout and dtype, and its tokenizer from files of both kinds."""

import builtins
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import tiny, tiny_video
from tests.memory.cases import RULES
from tests.thinned import thinned

from lowtide.casting.cast_weight import small_of
from lowtide.casting.casting import NAMED_CASTINGS, Casting
from lowtide.loading.components import save_component, spec_of
from lowtide.models.attention_backends import set_attention_backend, set_attention_slicing
from lowtide.models.put_weights import offload_named
from lowtide.models.t5 import T5EncoderModel
from lowtide.models.tokenizers import load_tokenizer
from lowtide.weights.fill import WeightsMismatchError
from lowtide.weights.index import CheckpointError

IDS = torch.arange(3, 17)[None]
LAYOUTS = [(None, None), ("fp16", None), (None, "20KB"), ("fp16", "10KB")]


def states(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


def load(folder, dtype=None, **options):
    return T5EncoderModel.from_folder(folder, dtype=dtype, **options)


def save(model, folder, variant=None, max_shard_size=None):
    save_component(model, folder, variant=variant, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tiny_video.text_encoder(), tmp_path / "text_encoder")


def test_the_peer_of_it_is_in_the_tables():
    assert spec_of("text_encoder", tiny_video.text_encoder()).class_name == "T5EncoderModel"


@pytest.mark.parametrize(("variant", "shard_size"), LAYOUTS)
@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_it_crosses_both_ways(tmp_path, who, variant, shard_size):
    model = tiny_video.text_encoder()
    if who == "ours":
        save(model, tmp_path / "text", variant, shard_size)
    else:
        model.save_pretrained(tmp_path / "text", variant=variant, max_shard_size=shard_size or "5GB")
    assert (len(list((tmp_path / "text").glob("*.safetensors"))) > 1) == (shard_size is not None)
    here = load(tmp_path / "text", variant=variant)
    there = transformers.T5EncoderModel.from_pretrained(tmp_path, subfolder="text", variant=variant)
    for other in (here, there):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
        assert other.shared.weight is other.encoder.embed_tokens.weight
    assert not here.training
    assert torch.equal(states(here), states(there))


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_the_embedding_under_either_name_or_both(folder, names):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    table = next(tensor for name, tensor in tensors.items() if name in ("shared.weight", "encoder.embed_tokens.weight"))
    rest = {name: tensor for name, tensor in tensors.items() if "shared" not in name and "embed_tokens" not in name}
    save_file({**rest, **{f"{name}.weight": table.clone() for name in names}}, file)
    loaded = load(folder)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert torch.equal(states(loaded), states(tiny_video.text_encoder()))


def test_embeddings_that_differ_are_refused(folder):
    file = folder / "model.safetensors"
    table = tiny_video.text_encoder().shared.weight
    save_file({**load_file(file), "shared.weight": table, "encoder.embed_tokens.weight": table + 1}, file)
    with pytest.raises(WeightsMismatchError, match="one tied tensor in the model, different values in the file"):
        load(folder)


def test_a_whole_t5_serves_as_an_encoder(folder):
    file = folder / "model.safetensors"
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
    save_file({**load_file(file), **decoder}, file)
    assert torch.equal(states(load(folder)), states(tiny_video.text_encoder()))
    save_file({**load_file(file), "encoder.more": torch.ones(2)}, file)  # negative control
    with pytest.raises(WeightsMismatchError, match=r"encoder\.more"):
        load(folder)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = {name: casting for name, casting in NAMED_CASTINGS.items() if casting.loses and not casting.int8_matmul}
OFFLOADS = [None, "model", "block", "leaf", "sequential"]


@pytest.mark.parametrize(("saved", "asked", "offload"), thinned(DTYPES, [None, *DTYPES], [None, "block"]))
def test_dtypes_are_the_peers(tmp_path, saved, asked, offload):
    """In float16 the layer that overflows is float32, whatever the file holds."""
    folder = save(tiny_video.text_encoder().to(saved), tmp_path / "text")
    ours = load(folder, asked, offload=offload_named(offload, "cpu"))
    theirs = transformers.T5EncoderModel.from_pretrained(folder, dtype=asked or "auto")
    wanted = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == wanted
    assert ours.dtype == theirs.dtype == (asked or saved)
    assert torch.equal(states(ours), states(theirs))


def test_a_wide_layer_does_not_overflow_in_float16(tmp_path):
    model = tiny_video.text_encoder()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e4)
    loaded = load(save(model, tmp_path / "text"), torch.float16)
    expected = states(model)
    assert tiny.difference(states(loaded), expected) < 0.02
    assert tiny.difference(states(loaded.half()), expected) > 0.02  # negative control


@pytest.mark.parametrize("name", RULES)
def test_under_every_rule(folder, name):
    from lowtide.memory.attach import attach, detach
    from lowtide.memory.stream import Stream

    loaded, rule = load(folder, torch.bfloat16), RULES[name]
    expected = states(loaded)
    attach(loaded, rule, Stream(torch.device("cpu"), prefetch=rule.prefetch))
    assert torch.equal(states(loaded), expected)
    assert torch.equal(states(loaded), expected)
    detach(loaded)
    assert torch.equal(states(loaded), expected)


@pytest.mark.parametrize(("casting", "offload", "dtype"), thinned(EIGHT_BITS, OFFLOADS, DTYPES))
def test_cast_while_loading(folder, dtype, casting, offload):
    plain = load(folder, dtype, casting=EIGHT_BITS[casting])
    loaded = load(folder, dtype, casting=EIGHT_BITS[casting], offload=offload_named(offload, "cpu"))
    expected = states(plain)
    assert expected.dtype == dtype
    assert torch.equal(states(loaded), expected)
    uncast = load(folder, dtype)
    assert not torch.equal(states(uncast), expected)
    uncast.load_state_dict({name: tensor.clone() for name, tensor in plain.state_dict().items()})
    assert torch.equal(states(uncast), expected)
    again = load(save(plain, folder.parent / "again"), dtype)
    assert torch.equal(states(again), expected)
    assert again.shared.weight is again.encoder.embed_tokens.weight


WIDE = {
    **EIGHT_BITS,
    "plain": Casting("float8_e4m3fn", compute="float16"),
    "left out": Casting("int8", skip_patterns=(r"\.wo$",)),
}


@pytest.mark.parametrize(("offload", "casting"), thinned(OFFLOADS, WIDE, most=2))
def test_a_wide_layer_that_is_cast_does_not_overflow_in_float16(tmp_path, casting, offload):
    model = tiny_video.text_encoder()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(2e3 if casting == "plain" else 2e5)
            block.layer[1].DenseReluDense.wi_1.weight.mul_(100 if casting == "plain" else 1)
    folder, asked = save(model, tmp_path / "text"), None if WIDE[casting].compute else torch.float16
    rule = {"offload": offload_named(offload, "cpu")}
    loaded = load(folder, asked, casting=WIDE[casting], **rule)
    model.load_state_dict({name: tensor.clone() for name, tensor in loaded.state_dict().items()})
    expected = states(model)  # of the same rounded weights, in float32
    assert expected.isfinite().all()
    again = load(save(loaded, tmp_path / "again"), **rule)
    for one in (loaded, again):
        layer = one.encoder.block[0].layer[1].DenseReluDense
        assert (layer.wi_0.weight.dtype, layer.wo.weight.dtype) == (torch.float16, torch.float32)
        assert (small_of(layer.wo.weight) is None) == (casting == "left out")
        assert states(one).dtype == torch.float16
        assert tiny.difference(states(one), expected) < 0.02
    assert torch.equal(states(again), states(loaded))
    wrong = states(loaded.half())  # negative control
    assert not wrong.isfinite().all() or tiny.difference(wrong, expected) > 0.02


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["math", "chunked", "flash", "slices"])
def test_attention_by_other_kernels_keeps_the_biases_of_positions(how, masked):
    model, mask = tiny_video.text_encoder(), (IDS < 12).long() if masked else None
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(3)

    def compute():
        with torch.no_grad():
            return model(IDS, attention_mask=mask).last_hidden_state

    expected = compute()
    if how == "slices":
        set_attention_slicing([model], "max")
    else:
        set_attention_backend([model], how)
    assert tiny.difference(compute(), expected) < 1e-5
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(0)
    assert tiny.difference(compute(), expected) > 0.01  # negative control


# ---- tokenizers


@pytest.fixture(params=tiny_video.WRITERS)
def words(request, tmp_path):
    tiny_video.WRITERS[request.param](tmp_path / "words")
    return tmp_path / "words"


TEXTS = ["A red panda", "the sea at night, 静か", "", "<extra_id_3> boat"]


@pytest.mark.parametrize("class_name", ["T5Tokenizer", "T5TokenizerFast"])
def test_a_tokenizer_of_either_kind(words, class_name):
    tokenizer = load_tokenizer(words, class_name)
    assert tokenizer.model_max_length == tiny_video.MAX_TOKENS
    theirs = transformers.T5TokenizerFast.from_pretrained(words)
    call = {"padding": "max_length", "max_length": 8, "truncation": True}
    assert tokenizer(TEXTS, **call).input_ids == theirs(TEXTS, **call).input_ids
    first, _, empty, sentinel = tokenizer(TEXTS).input_ids
    assert first[-1] == 1
    assert 2 in first  # the vocabulary has no capital letters
    assert tokenizer.decode(first[:-1]).endswith("red panda")
    assert empty == [1]
    assert len(sentinel) == 3
    assert len(tokenizer) <= 200
    assert tokenizer(TEXTS, **call).input_ids[2] == [1, *[0] * 7]


def test_pieces_are_those_of_sentencepiece(tmp_path):
    import sentencepiece

    tiny_video.write_pieces(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = load_tokenizer(tmp_path, "T5Tokenizer")
    for text in ("a red panda", "others watch the boat", "pandas"):
        assert tokenizer(text).input_ids == [*pieces.encode(text), 1]


def test_it_is_saved_so_that_the_peer_reads_it(words, tmp_path):
    tokenizer = load_tokenizer(words, "T5Tokenizer")
    save(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", "T5Tokenizer")
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path / "saved")
    for other in (again, theirs):
        assert other(TEXTS).input_ids == tokenizer(TEXTS).input_ids
        assert other.model_max_length == tokenizer.model_max_length
    assert spec_of("tokenizer", again).class_name == "T5Tokenizer"


def test_a_length_is_not_needed(words):
    """T5 has no table of positions: older files say nothing of a length."""
    tiny_video.write_config(words, model_max_length=None)
    assert load_tokenizer(words, "T5Tokenizer").model_max_length > 10**6
    tiny_video.write_config(words, model_max_length=-1)
    with pytest.raises(CheckpointError, match="model_max_length=-1 is not possible"):
        load_tokenizer(words, "T5Tokenizer")


@pytest.mark.parametrize("write", tiny_video.WRITERS.values(), ids=tiny_video.WRITERS)
def test_neither_kind_needs_another_package(tmp_path, monkeypatch, write):
    write(tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("sentencepiece", "google", "tiktoken", "transformers")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert load_tokenizer(tmp_path, "T5Tokenizer")("sea").input_ids[-1] == 1


@pytest.mark.parametrize("content", [b"", b"\x00", b"no protobuf", b"\xff" * 300])
def test_a_broken_file_of_pieces_is_named(tmp_path, content, capfd):
    tiny_video.write_pieces(tmp_path)
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spiece.model: no SentencePiece model can be read from it"):
        load_tokenizer(tmp_path, "T5Tokenizer")
    assert "tiktoken" not in "".join(capfd.readouterr()).lower()


def test_pieces_cut_off_are_refused(tmp_path):
    tiny_video.write_pieces(tmp_path)
    file = tmp_path / "spiece.model"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path, "T5Tokenizer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_broken_json_is_named(tmp_path, name):
    tiny_video.write_tokenizer_json(tmp_path)
    (tmp_path / name).write_text('{"a": ', encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*is not valid JSON"):
        load_tokenizer(tmp_path, "T5Tokenizer")


def test_without_a_vocabulary(tmp_path):
    tiny_video.write_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor spiece.model: no vocabulary"):
        load_tokenizer(tmp_path, "T5Tokenizer")


def test_the_json_is_taken_where_both_are(tmp_path):
    tiny_video.write_tokenizer_json(tmp_path)
    expected = load_tokenizer(tmp_path, "T5Tokenizer")(TEXTS).input_ids
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "kept")
    tiny_video.write_pieces(tmp_path)
    assert load_tokenizer(tmp_path, "T5Tokenizer")(TEXTS).input_ids == expected
    assert json.loads((tmp_path / "kept").read_text()) == json.loads((tmp_path / "tokenizer.json").read_text())
