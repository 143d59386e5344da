"""Folders that are broken on purpose end in one error that names file and entry, at once and in little memory."""

import base64
import json
import os
import shutil
import struct
import time

import pytest
from tests import tiny, tiny_video
from tests.memory_peaks import peak_of
from typer.testing import CliRunner

from lowtide.cli.app import app
from lowtide.configs import CheckpointError
from lowtide.pipelines.base import DiffusionPipeline

MOST_SECONDS, MOST_BYTES = 2, 200_000_000
ANY_LAYERS = "too many tensors.*layers"
FOREIGN = {
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "auto_map": {"AutoModel": "owner--file.Class", "AutoConfig": "owner--file.Config"},
    "trust_remote_code": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "num_labels": 10**8,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.pipeline(tmp_path_factory.mktemp("words"), checker=True).save_pretrained(folder / "pictures")
    tiny_video.write_checkpoint(folder / "clips")
    return folder


def entries(name, **changes):
    """Change entries of a JSON file; of entries that hold entries, those inside."""

    def breaks(folder):
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            merge = isinstance(value, dict) and isinstance(content.get(key), dict)
            content[key] = {**content[key], **value} if merge else value
        (folder / name).write_text(json.dumps(content))

    return breaks


def inserted(name, text):
    """Put text behind the first brace of a file."""

    def breaks(folder):
        (folder / name).write_text((folder / name).read_text().replace("{", "{" + text, 1))

    return breaks


def in_tokenizer(change):
    def breaks(folder):
        file = folder / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return breaks


def with_map(content, depth=1):
    encoded = base64.b64encode(content).decode() if isinstance(content, bytes) else content
    normalizer = {"type": "Precompiled", "precompiled_charsmap": encoded}
    for _ in range(depth):
        normalizer = {"type": "Sequence", "normalizers": [normalizer]}
    return in_tokenizer(lambda tokenizer: tokenizer.update(normalizer=normalizer))


def bytes_in(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def sparse(name):
    def breaks(folder):
        with open(folder / name, "wb") as file:
            file.truncate(2**31)

    return breaks


def pipe_at(name):
    def breaks(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return breaks


def header(name, count):
    def breaks(folder):
        claim = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        content = f"{{{','.join([claim % number for number in range(count)])}}}".encode()
        (folder / name).write_bytes(struct.pack("<Q", len(content)) + content)

    return breaks


def pieces(change):
    """Damage the map of characters inside `spiece.model`."""

    def breaks(folder):
        file = folder / "tokenizer" / "spiece.model"
        content = bytearray(file.read_bytes())
        at = content.index(struct.pack("<I", 179200))  # the size of the trie of the usual map
        change(content, at)
        file.write_bytes(content)

    return breaks


def overwrite(first, new):
    return pieces(lambda content, at: content.__setitem__(slice(at + first, at + first + len(new)), new))


UNET, VAE, TEXT, SCHEDULE = "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler_config.json"
SCHEDULE, CHECKER, WORDS = f"scheduler/{SCHEDULE}", "safety_checker/config.json", "tokenizer/tokenizer.json"
PROCESSOR, WEIGHTS = "feature_extractor/preprocessor_config.json", "vae/diffusion_pytorch_model.safetensors"
DIGITS = '"zz": ' + "9" * 5000 + ","
HUGE = struct.pack("<I", 2**32 - 4) + b"\0" * 8

PICTURES = {
    "too many positions": (entries(TEXT, max_position_embeddings=4 * 10**8), f"{TEXT}.*max_position_embeddings"),
    "too many positions for the weights": (entries(TEXT, max_position_embeddings=60_000), "position_embedding.weight"),
    "a vocabulary larger than the weights": (entries(TEXT, vocab_size=2**20), "token_embedding.weight"),
    "layers of text": (entries(TEXT, num_hidden_layers=200), f"{TEXT}.*num_hidden_layers=200"),
    "heads that do not divide": (entries(TEXT, num_attention_heads=5), f"{TEXT}.*num_attention_heads=5"),
    "an activation": (entries(TEXT, hidden_act="os.system"), f"{TEXT}.*hidden_act"),
    "an eps of text below zero": (entries(TEXT, layer_norm_eps=-1), f"{TEXT}.*layer_norm_eps"),
    "2^20 layers a block": (entries(UNET, layers_per_block=2**20), f"{UNET}.*layers_per_block=1048576"),
    "layers in layers": (
        entries(UNET, layers_per_block=200, transformer_layers_per_block=200),
        f"{UNET}.*{ANY_LAYERS}",
    ),
    "layers of the VAE": (entries(VAE, layers_per_block=150), f"{VAE}.*{ANY_LAYERS}"),
    "20,000 levels": (
        entries(VAE, block_out_channels=[8] * 20_000, down_block_types=["x"] * 20_000),
        f"{VAE}.*block_out_channels|{VAE}.*down_block_types",
    ),
    "widths": (entries(UNET, block_out_channels=[2**20] * 2), "unet/diffusion_pytorch_model.safetensors do not match"),
    "an eps below zero": (entries(UNET, norm_eps=-1), f"{UNET}.*norm_eps=-1"),
    "a side": (entries(UNET, sample_size=10**6), f"{UNET}.*sample_size"),
    "a scale of NaN": (entries(VAE, scaling_factor=float("nan")), f"{VAE}.*scaling_factor is NaN"),
    "a scale of zero": (entries(VAE, scaling_factor=0), f"{VAE}.*scaling_factor=0"),
    "an infinite scale": (entries(VAE, scaling_factor=float("inf")), f"{VAE}.*scaling_factor=inf"),
    "layers of vision": (entries(CHECKER, vision_config={"num_hidden_layers": 200}), f"{CHECKER}.*num_hidden_layers"),
    "pixels of vision": (entries(CHECKER, vision_config={"image_size": 2**20}), f"{CHECKER}.*image_size"),
    "pixels of a crop": (entries(PROCESSOR, size={"shortest_edge": 10**9}), f"{PROCESSOR}.*size"),
    "colours": (entries(PROCESSOR, image_mean=["x"]), f"{PROCESSOR}.*image_mean"),
    "a filter": (entries(PROCESSOR, resample=99), f"{PROCESSOR}.*resample=99"),
    "digits": (inserted(SCHEDULE, DIGITS), f"{SCHEDULE}: zz is a number of 5000 digits"),
    "digits of a model": (inserted(UNET, DIGITS), f"{UNET}: zz is a number of 5000 digits"),
    "digits in a list": (inserted(UNET, f'"zz": [[{"9" * 5000}]],'), f"{UNET}: zz is a number of 5000 digits"),
    "digits of a vocabulary": (inserted(WORDS, DIGITS), f"{WORDS}: zz is a number of 5000 digits"),
    "defaults that are no list": (entries(SCHEDULE, _use_default_values=5), f"{SCHEDULE}.*_use_default_values=5"),
    "betas of text": (entries(SCHEDULE, trained_betas=["x"] * 1000), f"{SCHEDULE}.*trained_betas"),
    "timesteps": (entries(SCHEDULE, num_train_timesteps=10**6), f"{SCHEDULE}.*num_train_timesteps"),
    "a range of text": (entries(SCHEDULE, clip_sample_range="x"), f"{SCHEDULE}.*clip_sample_range"),
    "a flag of text": (entries(SCHEDULE, set_alpha_to_one="x"), f"{SCHEDULE}.*set_alpha_to_one"),
    "a class of lists": (entries("model_index.json", unet=["a"] * 10**5), "model_index.json: entry 'unet'"),
    "a class name of lists": (entries("model_index.json", _class_name=["a"]), "model_index.json: _class_name"),
    "lists in lists": (inserted(UNET, '"a": ' + "[" * 10**5 + "]" * 10**5 + ","), f"{UNET} is not valid JSON"),
    "2 GB of configuration": (sparse(UNET), f"{UNET}: 2147483648 bytes"),
    "2 GB of index": (sparse("model_index.json"), "model_index.json: 2147483648 bytes"),
    "2 GB of vocabulary": (sparse(WORDS), f"{WORDS}: 2147483648 bytes"),
    "2 GB of template": (sparse("tokenizer/chat_template.jinja"), "chat_template.jinja: 2147483648 bytes"),
    "2 GB of zeros": (sparse(WEIGHTS), f"{WEIGHTS}: the header must begin"),
    "a pipe": (pipe_at(UNET), f"{UNET}: not a regular file"),
    "a pipe of words": (pipe_at(WORDS), f"{WORDS}: not a regular file"),
    "a pipe of weights": (pipe_at(WEIGHTS), f"{WEIGHTS}: not a regular file"),
    "1,200,000 tensors": (header(WEIGHTS, 1_200_000), f"{WEIGHTS}: the header claims"),
    "50,000 tensors": (header(WEIGHTS, 50_000), f"{WEIGHTS}: the header names 50000 tensors"),
    "a map of 4 GB": (with_map(HUGE), f"{WORDS}: normalizer.*precompiled_charsmap.*claims 4294967292"),
    "a map deep inside": (with_map(HUGE, 3), f"{WORDS}: normalizer.*normalizers.*precompiled_charsmap"),
    "a map too deep": (with_map(HUGE, 30), f"{WORDS}: normalizer.*nested too deep"),
    "no map": (with_map(b""), f"{WORDS}: normalizer.*precompiled_charsmap is empty"),
    "a map cut off": (with_map(b"\0"), f"{WORDS}: normalizer.*precompiled_charsmap is damaged"),
    "a map out of itself": (with_map(struct.pack("<I", 4) + b"\xff" * 4 + b"a\0"), "leads out of itself"),
    "a map of no UTF-8": (with_map(struct.pack("<I", 4) + b"\0" * 4 + b"\xff\xfe"), "texts are not UTF-8"),
    "a map of no base64": (with_map("%%%"), f"{WORDS}: normalizer.*precompiled_charsmap is not base64"),
    "a map of numbers": (with_map(5), f"{WORDS}: normalizer.*precompiled_charsmap must be text"),
    "a word of a large number": (
        in_tokenizer(lambda t: t["model"]["vocab"].update(zz=2**32 - 1)),
        "token of number 42949",
    ),
    "an expression": (
        in_tokenizer(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}})),
        "tokenizer: no CLIPTokenizer can be read",
    ),
}
CLIPS = {
    "an eps below zero": (entries("transformer/config.json", norm_eps=-1), "transformer/config.json.*norm_eps=-1"),
    "layers": (entries("transformer/config.json", num_layers=200), f"transformer/config.json.*{ANY_LAYERS}"),
    "sides": (entries("transformer/config.json", sample_width=2**20), "transformer/config.json.*sample_width"),
    "a table of positions": (
        entries(
            "transformer/config.json", use_learned_positional_embeddings=True, sample_width=4096, sample_height=4096
        ),
        "patch_embed.pos_embedding",
    ),
    "a scale of zero": (entries(VAE, scaling_factor=0), f"{VAE}.*scaling_factor=0"),
    "layers of T5": (entries(TEXT, num_layers=200), f"{TEXT}.*{ANY_LAYERS}"),
    "buckets of T5": (entries(TEXT, relative_attention_num_buckets=2**30), f"{TEXT}.*relative_attention_num_buckets"),
    "an eps of T5": (entries(TEXT, layer_norm_epsilon=0), f"{TEXT}.*layer_norm_epsilon=0"),
    "a gate that is none": (entries(TEXT, is_gated_act=False), f"{TEXT}.*is_gated_act=False"),
    "extra tokens": (entries("tokenizer/tokenizer_config.json", extra_ids=10**9), "tokenizer_config.json.*extra_ids"),
    "pieces cut off": (bytes_in("tokenizer/spiece.model", b"\x0a\xff\x01abc"), "spiece.model.*ends inside a field"),
    "pieces of zeros": (bytes_in("tokenizer/spiece.model", b"\0" * 1000), "spiece.model"),
    "2 GB of pieces": (sparse("tokenizer/spiece.model"), "spiece.model: 2147483648 bytes"),
    "a map of 4 GB": (overwrite(0, struct.pack("<I", 2**32 - 4)), "spiece.model: its map of characters is damaged"),
    "a map out of itself": (overwrite(4, b"\xfe" * 10**5), "spiece.model.*leads out of itself"),
}
CASES = [("pictures", name) for name in PICTURES] + [("clips", name) for name in CLIPS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_ends_at_once_and_says_why(whole, tmp_path, kind, name):
    folder = shutil.copytree(whole / kind, tmp_path / "model")
    breaks, said = (PICTURES if kind == "pictures" else CLIPS)[name]
    breaks(folder)
    began = time.process_time()
    with peak_of() as peak, pytest.raises(CheckpointError, match=said) as caught:
        DiffusionPipeline.from_pretrained(folder)
    assert time.process_time() - began < MOST_SECONDS
    assert peak.grown < MOST_BYTES
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()[0]) < 1000


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("pictures", "2^20 layers a block"),
        ("pictures", "a map of 4 GB"),
        ("pictures", "a scale of NaN"),
        ("pictures", "50,000 tensors"),
        ("clips", "a map out of itself"),
        ("clips", "layers"),
    ],
)
def test_the_command_ends_in_one_line(whole, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole / kind, tmp_path / "model")
    breaks, _ = (PICTURES if kind == "pictures" else CLIPS)[name]
    breaks(folder)
    video = ["--video"] if kind == "clips" else []
    result = CliRunner().invoke(app, ["generate", "a", "--model", str(folder), "--steps", "1", *video])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1
    assert result.stderr.rstrip().endswith(errors[0])
    assert str(folder) in errors[0]


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_unbroken(whole, kind):
    """Negative control."""
    assert type(DiffusionPipeline.from_pretrained(whole / kind)).__name__.endswith("Pipeline")


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_kernels_code_and_labels_of_a_configuration_are_not_ours(whole, tmp_path, kind):
    """A name of a kernel on the Hub would be foreign code; how attention is computed we choose."""
    folder = shutil.copytree(whole / kind, tmp_path / "model")
    entries(TEXT, **FOREIGN)(folder)
    if kind == "pictures":
        entries(CHECKER, **FOREIGN, vision_config=FOREIGN)(folder)
    with peak_of() as peak:
        loaded = DiffusionPipeline.from_pretrained(folder)
    assert peak.grown < MOST_BYTES
    for part in [loaded.text_encoder] + ([loaded.safety_checker] if kind == "pictures" else []):
        config = getattr(part.config, "vision_config", part.config)
        assert not {"auto_map", "quantization_config", "trust_remote_code", "id2label"} & set(config.to_dict())
        assert "owner" not in json.dumps(config.to_dict())
