"""Guests from the Hub: of all that a repository holds, what will be loaded is fetched."""

import huggingface_hub
import pytest
from tests.guests.families import FAMILIES
from tests.guests.guest_cases import WARNINGS
from tests.test_hub import ID, Hub

from lowtide.guests.checkpoint import GuestCheckpoint
from lowtide.hub import Source

pytest.importorskip("diffusers")
pytestmark = WARNINGS


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A repository with plain weights, those of a variant, which the autoencoder has not, and pickled ones."""
    folder, pipe = tmp_path_factory.mktemp("remote"), FAMILIES["Flux2 Klein"]().pipeline
    pipe.save_pretrained(str(folder))
    for name in ("transformer", "text_encoder"):
        getattr(pipe, name).save_pretrained(str(folder / name), variant="fp16", max_shard_size="100KB")
        (folder / name / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return folder


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_of_all_variants_the_one_that_is_loaded_is_fetched(remote, variant, tmp_path, monkeypatch):
    hub = Hub(remote, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    parts = GuestCheckpoint.opened(Source(ID, cache_dir=tmp_path), {}, variant=variant).parts()
    files = {name: {file.name for file in parts[name].index.files} for name in ("transformer", "text_encoder", "vae")}
    fetched = {name for name in hub.fetched() if not name.endswith((".json", ".txt", ".jinja"))}
    assert fetched == {f"{name}/{file}" for name, names in files.items() for file in names}
    assert all((".fp16" in file) == (variant is not None) for file in files["transformer"] | files["text_encoder"])
    assert files["vae"] == {"diffusion_pytorch_model.safetensors"}
