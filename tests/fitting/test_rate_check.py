"""Runs beside their predictions: which of them correct the rates, and by how much."""

from dataclasses import replace

import pytest
import torch
from tests.fitting import fits
from tests.fitting.fits import bare_machine  # noqa: F401
from tests.planning import plans

from lowtide.fitting import applied_plan
from lowtide.fitting.rate_check import OFF, correction, unchecked
from lowtide.machine.processor_share import Share
from lowtide.measuring.meter import StageReading
from lowtide.measuring.transfers import Flow
from lowtide.planning.rates import slower
from lowtide.planning.workload import Work

ALONE, BUSY = Share(0.0, 0.2), Share(10_000.0, 9.0)


@pytest.fixture
def plan():
    """A run that computing sets the pace of, for ten seconds a stage."""
    paced = {"seconds": 10.0, "compute_seconds": 10.0, "link_seconds": 0.0, "disk_seconds": 0.0}
    whole = plans.on_cpu()
    return replace(whole, stages=tuple(replace(stage, **paced) for stage in whole.stages))


def readings(plan, seconds, **changed):
    reading = StageReading("", 0, seconds, 1, None, None, None, None)
    return [replace(reading, name=stage.name, **changed) for stage in plan.stages]


def found(plan, seconds, share=ALONE, flows=None, so_far=1.0, **changed):
    return correction(plan, readings(plan, seconds, **changed), flows or {}, share, 1, so_far)


@pytest.mark.parametrize("seconds", [10.0, 12.0, 8.0])
def test_a_run_about_as_predicted_corrects_nothing(plan, seconds):
    assert found(plan, seconds) is None


@pytest.mark.parametrize("seconds", [50.0, 2.0])
def test_one_that_is_off_does_and_is_right_after_that(plan, seconds):
    factor, said = found(plan, seconds)
    assert (factor > 1) == (seconds > 10)
    assert 1 / OFF < seconds / (10.0 * factor) < OFF
    assert found(plan, seconds, so_far=factor) is None
    assert "predicted (load 0.2)" in said


def test_a_run_that_does_not_tell_corrects_nothing(plan):
    assert found(plan, 50.0, share=BUSY) is None
    assert found(plan, 50.0, shared=True) is None
    assert found(plan, 50.0, flows={stage.name: Flow(1, 40.0) for stage in plan.stages}) is None
    brief = replace(plan, stages=tuple(replace(stage, seconds=0.1) for stage in plan.stages[:1]))
    assert found(brief, 0.5) is None
    with unchecked():
        assert found(plan, 50.0) is None
    assert found(plan, 50.0) is not None


def test_stretches_of_one_stage_are_one_run_of_it(plan):
    """As in a guest that goes from one network to another and back in every step."""
    in_stretches = [replace(reading, seconds=1.0) for reading in readings(plan, 10.0) for _ in range(10)]
    assert correction(plan, in_stretches, {}, ALONE, 1, 1.0) is None


def test_slower_rates_take_longer():
    work = Work(convolution=1e12, product=1e12, attention=1e12, touched=1e10, kernels=1000)
    assert slower(fits.RATES, 3).seconds(work) == pytest.approx(3 * fits.RATES.seconds(work))
    assert slower(fits.RATES, 3).disk == fits.RATES.disk
    known = replace(fits.RATES, packed_convolution=1e12, packed_product=1e12, arranging=1e9)
    arranged = replace(work, arranged=1e9)
    for rates in (known, known.with_packed()):
        assert slower(rates, 3).seconds(arranged) == pytest.approx(3 * rates.seconds(arranged))


@pytest.mark.usefixtures("bare_machine")
def test_a_pipeline_corrects_them_after_its_run_and_gives_the_same_bits(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(applied_plan, "correction", lambda *_: (2.0, "it was slow"))
    monkeypatch.setattr(applied_plan, "correct_rates", lambda *given: kept.append(given))
    pipe = fits.load(fits.checkpoint(tmp_path, "pictures"), "pictures")
    pipe.fit(ram="8GB", height=16, width=16, steps=2, output="latent")

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe("a", height=16, width=16, num_inference_steps=2, output_type="latent", generator=generator).images

    first = run()
    applied, before = pipe.applied, pipe.plan
    assert kept == [(torch.device("cpu"), torch.float32, 2.0)]
    assert applied.rates_note == "it was slow"
    assert applied.fit.rates == slower(fits.RATES, 2)
    assert torch.equal(run(), first)
    assert pipe.plan is before, "the plan at work stays"
    assert applied.corrected == 4


@pytest.mark.usefixtures("bare_machine")
def test_one_that_failed_or_was_stopped_corrects_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(applied_plan, "correction", lambda *_: pytest.fail("it was looked at"))
    pipe = fits.load(fits.checkpoint(tmp_path, "pictures"), "pictures")
    pipe.fit(ram="8GB", height=16, width=16, steps=2)

    def stop(pipe, *_):
        pipe._interrupt = True
        return {}

    def fail(*_):
        raise KeyError("no")

    call = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    pipe("a", callback_on_step_end=stop, **call)
    with pytest.raises(KeyError):
        pipe("a", callback_on_step_end=fail, **call)
