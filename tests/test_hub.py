"""From a folder or a Hub id to local files, with a stand-in for the Hub that keeps its cache as the real one does."""

import hashlib
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tests import tiny

from lowtide.hub import Source, weight_patterns
from lowtide.models.unet import UNet2DConditionModel
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

ID = "someone/tiny-boats"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Gives the files of `remote` that match the patterns: blobs, and links to them in a snapshot."""

    def __init__(self, remote, cache):
        self.remote = remote
        self.home = cache / f"models--{ID.replace('/', '--')}"
        self.asked = []

    def snapshot_download(self, repo_id, *, allow_patterns, **options):
        assert repo_id == ID
        self.asked.append({"patterns": allow_patterns, **options})
        for name in self.names():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.fetch(name)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        return str(self.snapshot)

    def fetch(self, name):
        content = (self.remote / name).read_bytes()
        blob = self.home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = self.snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1), "blobs", blob.name))

    def names(self):
        return [str(path.relative_to(self.remote)) for path in self.remote.rglob("*") if path.is_file()]

    @property
    def snapshot(self):
        return self.home / "snapshots" / COMMIT

    def fetched(self):
        return sorted(str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_symlink())


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A repository with all that such repositories hold: fp32, fp16 and pickled weights, pictures, a checker."""
    folder = tmp_path_factory.mktemp("remote")
    pipe = tiny.pipeline(tmp_path_factory.mktemp("words"), checker=True)
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="200KB")
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "tiny-pruned.safetensors").write_bytes(b"x" * 100)
    (folder / "README.md").write_text("# Boats")
    (folder / "example.png").write_bytes(b"png")
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"x")
    return folder


@pytest.fixture
def hub(remote, tmp_path, monkeypatch):
    stand_in = Hub(remote, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
CHECKER_FILES = {
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
}
INDEXES = {"unet/diffusion_pytorch_model.safetensors.index.fp16.json"}  # small: they may come along


def test_only_the_files_needed_are_fetched(hub):
    pipe = DiffusionPipeline.from_pretrained(ID)
    assert type(pipe) is StableDiffusionPipeline
    assert set(hub.fetched()) - INDEXES == FILES | CHECKER_FILES


def test_a_part_that_is_left_out_or_passed_in_is_not_fetched(hub):
    unet = tiny.unet()
    pipe = DiffusionPipeline.from_pretrained(ID, safety_checker=None, feature_extractor=None, unet=unet)
    assert pipe.unet is unet
    assert set(hub.fetched()) == {name for name in FILES if not name.startswith("unet/")}


def test_of_a_variant_only_its_own_weights_are_fetched(hub):
    DiffusionPipeline.from_pretrained(ID, variant="fp16", safety_checker=None, feature_extractor=None)
    weights = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert weights
    assert all(".fp16" in name for name in weights)
    assert sum(name.startswith("unet/") for name in weights) > 1
    assert not any(name.startswith("safety_checker") for name in hub.fetched())


def test_a_model_in_a_subfolder(hub):
    loaded = UNet2DConditionModel.from_pretrained(ID, subfolder="unet")
    assert set(hub.fetched()) == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert loaded.config.sample_size == 8


def test_where_and_as_whom_is_passed_on(hub, tmp_path):
    options = {"revision": "v1", "cache_dir": tmp_path, "token": "secret", "local_files_only": True}
    DiffusionPipeline.from_pretrained(ID, **options)
    UNet2DConditionModel.from_pretrained(ID, subfolder="unet", **options)
    assert len(hub.asked) == 4  # the index, the configurations, the weights; the U-Net
    assert all({key: asked[key] for key in options} == options for asked in hub.asked)


def test_pictures_from_the_cache_are_those_of_the_folder(hub, remote):
    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe("a boat", num_inference_steps=1, generator=tiny.seeded(1), output_type="pt").images

    parts = {"safety_checker": None, "feature_extractor": None}
    cached, local = (DiffusionPipeline.from_pretrained(name, **parts) for name in (ID, remote))
    assert picture(cached).equal(picture(local))


def test_the_real_cache_is_read_offline(hub, monkeypatch):
    """The files that the stand-in has put there are found by the real function, which may ask nobody."""
    DiffusionPipeline.from_pretrained(ID)
    (hub.home / "refs").mkdir()
    (hub.home / "refs" / "main").write_text(COMMIT)
    monkeypatch.undo()
    loaded = DiffusionPipeline.from_pretrained(ID, cache_dir=hub.home.parent, local_files_only=True)
    assert loaded.unet.config.sample_size == 8
    loaded.save_pretrained(hub.home.parent / "copy")
    assert not any(path.is_symlink() for path in (hub.home.parent / "copy").rglob("*"))


def test_a_folder_of_links_is_never_written_through(hub):
    pipe = DiffusionPipeline.from_pretrained(ID)
    blobs = {path: path.read_bytes() for path in (hub.home / "blobs").iterdir()}
    pipe.to(dtype=torch.float16).save_pretrained(hub.snapshot)
    assert {path: path.read_bytes() for path in (hub.home / "blobs").iterdir()} == blobs
    assert DiffusionPipeline.from_pretrained(hub.snapshot, torch_dtype="auto").dtype == torch.float16


def test_offline_and_not_in_the_cache(tmp_path):
    for local_files_only in (True, False):  # tests run with HF_HUB_OFFLINE=1
        with pytest.raises(FileNotFoundError, match="the Hub could not be reached") as caught:
            DiffusionPipeline.from_pretrained(ID, cache_dir=tmp_path, local_files_only=local_files_only)
        for word in (ID, "HF_HUB_OFFLINE", "cache", "path of a downloaded folder"):
            assert word in str(caught.value)


def failing(error_class, reason):
    response = SimpleNamespace(headers={}, request=None, status_code=404)

    def snapshot_download(*_, **__):
        raise error_class(reason, response=response)

    return snapshot_download


@pytest.mark.parametrize("error_class", [RepositoryNotFoundError, GatedRepoError])
def test_a_refusal_of_the_hub(monkeypatch, error_class):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error_class, "you shall not pass"))
    with pytest.raises(FileNotFoundError, match=r"does not give 'someone/tiny-boats'.*revision v2.*you shall not pass"):
        DiffusionPipeline.from_pretrained(ID, revision="v2")
    with pytest.raises(FileNotFoundError, match=r"revision main.*hf auth login.*token="):
        DiffusionPipeline.from_pretrained(ID)


@pytest.mark.parametrize(
    "name", ["nothing-here", "./nothing/here", "a/b/c", "../x/y", "-x/y", "/no/such", "a b/c", "a/"]
)
def test_neither_folder_nor_id(name, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # must not be asked
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder here, and it is not a Hub id"):
        Source(name).fetch(["*"])


@pytest.mark.parametrize("name", ["owner/..", "owner/a--b", "owner/a..b"])
def test_ids_that_the_hub_itself_refuses(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="it is not a Hub id: "):
        Source(name, cache_dir=tmp_path).fetch(["*"])


def test_a_file_is_no_checkpoint_folder(tmp_path):
    (tmp_path / "sd.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"is a file. Give the folder of a checkpoint"):
        UNet2DConditionModel.from_pretrained(tmp_path / "sd.safetensors")


def test_a_folder_is_taken_as_it_is(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert Source(str(remote)).fetch([]) == remote
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(remote / "unet", tmp_path / "models" / "unet")
    assert Source("~/models").fetch([]) == tmp_path / "models"
    monkeypatch.chdir(tmp_path / "models")  # a folder comes before an id of the same name
    (tmp_path / "models" / "someone" / "tiny-boats").mkdir(parents=True)
    assert Source(ID).fetch([]) == Path(ID)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_patterns_take_one_variant_whole_or_in_shards(variant):
    dot = f".{variant}" if variant else ""
    own = [
        f"model{dot}.safetensors",
        f"model{dot}-00001-of-00002.safetensors",
        f"model.safetensors.index{dot}.json",
        *([f"model-00001-of-00002.{variant}.safetensors"] if variant else []),
    ]
    plain = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["model.bf16.safetensors", "model.bin", "model.non_ema.safetensors", "other.safetensors"]
    others += plain if variant else ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]
    patterns = weight_patterns("model", variant)
    assert [name for name in (*own, *others) if any(fnmatch(name, pattern) for pattern in patterns)] == own
