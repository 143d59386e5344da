"""Budgets on an accelerator: the allocator's own limit is set to what was planned, and holds."""

from pathlib import Path

import pytest
import torch
from tests.fitting.traced_once import traced_once  # noqa: F401

import lowtide
from lowtide.machine.accelerators import accelerator
from lowtide.planning.planner import Planner

pytestmark = pytest.mark.usefixtures("traced_once")
SHIPPED = Path(lowtide.__file__).parent / "assets" / "seascapes"
DTYPES = {"cuda": torch.float16, "sim": torch.float32}
SIDES = {"cuda": 256, "sim": 64}
"""The stand-in computes on the CPU, where half precision may be slow."""


def load(device):
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=DTYPES[device.type])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, device):
    size = {"height": SIDES[device.type], "width": SIDES[device.type]}
    generator = torch.Generator().manual_seed(3)
    return pipe("a boat", **size, num_inference_steps=2, generator=generator, output_type="pt").images.cpu()


def fit(pipe, device, vram):
    size = {"height": SIDES[device.type], "width": SIDES[device.type]}
    return pipe.fit(vram=vram, device=device, **size, steps=2, output="pt")


@pytest.fixture
def plain(device, made={}):  # noqa: B006
    """With all weights on the device; made once for each kind of it."""
    if device.type not in made:
        made[device.type] = draw(load(device).to(device), device)
    return made[device.type]


@pytest.fixture
def limited(device):
    """Sets the allocator's limit, and takes it away afterwards."""
    kind = accelerator(device)
    kind.give_back(device)
    yield lambda nbytes: kind.limit(device, nbytes)
    kind.limit(device, None)
    kind.give_back(device)


@pytest.fixture
def peaks(device, monkeypatch):
    """Peaks of allocated memory that somebody ended, as observers of stages do by beginning anew."""
    kind, ended = accelerator(device), []
    begin = kind.begin_peaks

    def begin_peaks(other):
        ended.append(kind.peaks(device)[0])
        begin(other)

    monkeypatch.setattr(kind, "begin_peaks", begin_peaks)
    return ended


@pytest.mark.parametrize("share", [0.0, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.3, 1.0))])
def test_the_allocators_limit_is_never_reached(device, plain, limited, peaks, share):
    pipe, kind = load(device), accelerator(device)
    fit(pipe, device, "80%")
    fitted = pipe.applied.fit
    curve = Planner(fitted.workload, fitted.rates).curve(fitted.budgets)
    least, most = curve[0][0], curve[-1][0]
    plan = fit(pipe, device, int(least + share * (most - least)))
    limited(max(stage.peak - stage.base for stage in plan.stages))
    kind.begin_peaks(device)
    peaks.clear()
    made = draw(pipe, device)
    assert torch.equal(made, plain) if plan.exactness == "equal bits" else torch.allclose(made, plain, atol=2e-2)
    assert max(*peaks, kind.peaks(device)[0]) <= max(stage.allocated for stage in plan.stages)
    assert not pipe.degradations


def test_a_limit_that_was_not_told_is_worked_around(device, plain, limited):
    pipe = load(device)
    plan = fit(pipe, device, "80%")
    limited(int(0.8 * max(stage.peak - stage.base for stage in plan.stages)))
    with pytest.warns(UserWarning, match="memory ran out"):
        made = draw(pipe, device)
    assert torch.allclose(made, plain, atol=2e-2)
    assert pipe.degradations
