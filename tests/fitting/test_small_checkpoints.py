"""Checkpoints whose weights are saved in few bits: planned by these bytes, and computed with as they rest."""

import pytest
from tests.fitting import fits
from tests.fitting.fits import bare_machine, make, traced_once  # noqa: F401

import lowtide
from lowtide.casting.cast_weight import small_of
from lowtide.memory.bounds import aligned
from lowtide.memory.store import DiskRest


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fits.checkpoint(tmp_path_factory.mktemp("plain"), "pictures")


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.usefixtures("bare_machine", "traced_once")
def test_plans_count_small_bytes(plain, tmp_path, form):
    fits.load(plain, "pictures", casting=form).save_pretrained(tmp_path / form)
    expected = make(fits.load(tmp_path / form, "pictures"))
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    for budget in ("8GB", None):
        smallest = 8 * 10**9
        if budget is None:
            with pytest.raises(lowtide.BudgetError) as refused:
                lowtide.load(tmp_path / form, ram="1KB", device="cpu", **size)
            smallest = refused.value.minimum.ram
        pipe = lowtide.load(tmp_path / form, ram=smallest, device="cpu", **size)
        pipe.set_progress_bar_config(disable=True)
        assert (make(pipe) - expected).abs().max() < (1e-5 if budget is None else 1e-9)
        for name in ("unet", "vae", "text_encoder"):
            weights = list(getattr(pipe, name).parameters())
            smalls = [small for weight in weights if (small := small_of(weight)) is not None]
            assert smalls
            assert all(isinstance(small.rest, DiskRest) for small in smalls)
            others = sum(aligned(weight.nbytes) for weight in weights if small_of(weight) is None)
            planned = pipe.plan.components[name].nbytes
            if name == "unet":  # of the others there are parts that are not read
                assert others + sum(small.nbytes for small in smalls) <= planned
            assert planned < 1.2 * (others + sum(aligned(small.nbytes) for small in smalls)), name
