"""What the source of a pipeline says of its call is what Python says of it."""

import inspect
import sys

import pytest

from lowtide.configs import CheckpointError
from lowtide.guests.library import NoGuestsError, place_of_diffusers
from lowtide.guests.written_call import call_of, written_call

diffusers = pytest.importorskip("diffusers")
NAMES = (
    "StableDiffusionXLImg2ImgPipeline",
    "FluxPipeline",
    "WanPipeline",
    "KandinskyV22CombinedPipeline",
    "DDPMPipeline",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_names_and_defaults(name):
    written = written_call(name)
    own = list(inspect.signature(getattr(diffusers, name).__call__).parameters.values())[1:]
    assert [(each.name, each.kind) for each in written.parameters.values()] == [(each.name, each.kind) for each in own]
    for ours, theirs in zip(written.parameters.values(), own, strict=True):
        assert ours.default == theirs.default or ours.default is None  # a default that is computed


def test_a_call_of_a_class_above_is_asked_of_python():
    assert written_call("VersatileDiffusionPipeline") is None
    assert "prompt" in call_of("StableDiffusionXLPipeline").parameters


def test_a_class_that_there_is_not():
    assert written_call("NoSuchPipeline") is None
    with pytest.raises(CheckpointError, match=r"'NoSuchPipeline', which diffusers .* does not have"):
        call_of("NoSuchPipeline")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(NoGuestsError, match=r"A FluxPipeline is served through.*pip install 'lowtide\[guests\]'"):
        call_of("FluxPipeline")
    with pytest.raises(NoGuestsError, match="A FluxPipeline"):
        place_of_diffusers("A FluxPipeline")
