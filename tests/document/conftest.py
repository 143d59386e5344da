"""Checkpoints and processes for the scripts of the document and of our guides."""

import pytest
from tests import tiny_video
from tests.document import checkpoints
from tests.document.processes import Fresh


@pytest.fixture(scope="session")
def fresh():
    """Runs scripts as a user would."""
    return Fresh()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A tiny checkpoint."""
    return checkpoints.write_tiny(tmp_path_factory.mktemp("tiny"), [8, 8, 16])


@pytest.fixture(scope="session")
def video_model(tmp_path_factory):
    """A tiny checkpoint of CogVideoX 5b's kind."""
    return tiny_video.write_checkpoint(tmp_path_factory.mktemp("video") / "model")


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """A tiny checkpoint, but with the 320 channels of Stable Diffusion at the U-Net's finest level."""
    return checkpoints.write_tiny(tmp_path_factory.mktemp("wide"), [320, 8])


@pytest.fixture(scope="session")
def sd15_model(tmp_path_factory):
    """A checkpoint of random weights with the shapes of Stable Diffusion 1.5."""
    return checkpoints.write_sd15(tmp_path_factory.mktemp("sd15"))
