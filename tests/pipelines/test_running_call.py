"""What callbacks and arguments of scripts change in a run, under offload and budgets: the same bits as without."""

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.fitting.fits import bare_machine, traced_once  # noqa: F401

from lowtide.fitting.meta_subject import Original
from lowtide.pipelines.clip_skip import skipping_layers

pytestmark = pytest.mark.usefixtures("bare_machine", "traced_once")


def weaker(pipe, step, timestep, tensors):
    pipe._guidance_scale = 2.0
    pipe.interrupt = step == 1


SMALL = {"height": 16, "width": 16}
PLANNED = {"output": "pt", "pictures": 2, "steps": 3, **SMALL}
CALL = {"clip_skip": 1, "guidance_rescale": 0.5, "callback_on_step_end": weaker}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fits.checkpoint(tmp_path_factory.mktemp("pictures"), "pictures")


@pytest.fixture(scope="module")
def told(folder):
    return fits.make(fits.load(folder, "pictures"), **SMALL, **CALL)


@pytest.mark.parametrize("name", CALL)
def test_each_of_them_changes_the_picture(folder, told, name):
    """Negative control."""
    call = {key: value for key, value in CALL.items() if key != name}
    assert not torch.equal(fits.make(fits.load(folder, "pictures"), **SMALL, **call), told)


@pytest.mark.parametrize("how", ["sequential", "model", "fitted"])
def test_where_weights_rest_changes_no_bit(folder, told, how):
    if how == "fitted":
        pipe = fits.load(folder, "pictures")
        pipe.fit(ram="8GB", **PLANNED)
    else:
        pipe = fits.load(folder, "pictures", offload=how, offload_device="cpu")
    assert torch.equal(fits.make(pipe, **SMALL, **CALL), told)
    assert pipe.interrupt


def test_layers_are_skipped_for_one_call_alone(folder):
    pipe = fits.load(folder, "pictures")
    before = fits.make(pipe, **SMALL)
    with pytest.raises(ZeroDivisionError), skipping_layers(pipe.text_encoder, 1):
        raise ZeroDivisionError
    assert torch.equal(fits.make(pipe, **SMALL), before)
    for wrong in (-1, 99, True, 1.5):
        with pytest.raises(ValueError, match=r"clip_skip=.* is not possible: it is from 0 to"):
            fits.make(pipe, **SMALL, clip_skip=wrong)
    assert torch.equal(fits.make(pipe, **SMALL, clip_skip=0), before)


def test_tiles_that_are_set_are_planned_for_anew(folder):
    """And those that a plan sets itself are not."""
    pipe = fits.load(folder, "pictures")
    pipe.fit(ram="8GB", **PLANNED)
    seen = Original.of(pipe)
    assert pipe.applied.fit.meta.is_of(pipe)
    pipe.vae.use_slicing = True
    assert Original.of(pipe) == seen
    pipe.vae.tile_sample_min_size = 16
    assert not pipe.applied.fit.meta.is_of(pipe)
    meta = pipe.applied.fit.meta
    fits.make(pipe, **SMALL)
    assert pipe.applied.fit.meta is not meta
    assert pipe.applied.fit.meta.subject.vae.tile_sample_min_size == 16


def test_a_function_that_checks_can_be_fitted(folder):
    pipe = fits.load(folder, "pictures")
    plain = fits.make(pipe, **SMALL)
    pipe.safety_checker = lambda images, **kwargs: (images.flip(-1), [False] * len(images))
    pipe.fit(ram="8GB", **PLANNED)
    assert torch.allclose(fits.make(pipe, **SMALL), plain.flip(-1), atol=1e-5)
    assert tiny.difference(plain, plain.flip(-1)) > 1e-2  # negative control
