"""Folders with broken files: each gives one clear error that names the file, and never anything else."""

import json
import shutil

import pytest
from tests import tiny

from lowtide.pipelines.base import DiffusionPipeline
from lowtide.weights.index import CheckpointError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny.pipeline(tmp_path_factory.mktemp("words"), checker=True).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "model")


def rewrite(file, **entries):
    content = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_unbroken(folder):
    """Negative control."""
    assert DiffusionPipeline.from_pretrained(folder).safety_checker is not None


JSON_FILES = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "safety_checker/config.json",
    "feature_extractor/preprocessor_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"3", b"\xff\xfe{}", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is not valid JSON|must hold a JSON object") as caught:
        DiffusionPipeline.from_pretrained(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises((FileNotFoundError, CheckpointError)) as caught:
        DiffusionPipeline.from_pretrained(folder)
    assert name.rpartition("/")[2] in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("text_encoder/config.json", {"hidden_size": "x"}),
        ("text_encoder/config.json", {"num_attention_heads": 5}),
        ("text_encoder/config.json", {"hidden_act": "no such"}),
        ("text_encoder/config.json", {"vocab_size": -3}),
        ("safety_checker/config.json", {"vision_config": 3}),
        ("feature_extractor/preprocessor_config.json", {"crop_size": []}),
        ("feature_extractor/preprocessor_config.json", {"size": "x"}),
        ("tokenizer/tokenizer.json", {"model": 3}),
        ("tokenizer/tokenizer.json", {"model": ...}),
        ("tokenizer/tokenizer.json", {"added_tokens": "x"}),
        ("tokenizer/tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": ...}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -1}),
    ],
)
def test_entries_that_transformers_cannot_read_name_the_folder(folder, name, entries):
    rewrite(folder / name, **entries)
    with pytest.raises(CheckpointError) as caught:
        DiffusionPipeline.from_pretrained(folder)
    assert str((folder / name).parent) in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_a_vocabulary_is_refused(folder, name):
    """The class of transformers would make do with none, and every prompt would mean nothing."""
    shutil.rmtree(folder / "tokenizer")
    tiny.write_tokenizer(folder / "tokenizer")
    assert len(DiffusionPipeline.from_pretrained(folder).tokenizer) == 518  # the older files do
    (folder / "tokenizer" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.json and merges.txt"):
        DiffusionPipeline.from_pretrained(folder)
