"""Whole pipelines on a stand-in for an accelerator: pictures, clips and a guest, under every offload and budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny, tiny_video
from tests.fitting import fits
from tests.fitting.traced_once import traced_once  # noqa: F401
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS, weights_of
from tests.memory.test_device_stream import MUTANTS
from tests.sim_tensor import simulated

import lowtide
from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import Casting
from lowtide.guests.networks import networks_of
from lowtide.memory import apply_residency, device_stream
from lowtide.memory.device_stream import DeviceStream
from lowtide.pipelines.not_finite import NotFiniteWarning
from lowtide.planning.plan import BudgetError

pytest.importorskip("diffusers")
pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]
DEVICE = "sim:1"
CAST = {None: None, "int8": Casting("int8"), "fp8": Casting("float8_e4m3fn", scaled=True)}


@dataclass(frozen=True)
class Case:
    """A pipeline, a call of it, and what it is planned for."""

    pipeline: Any
    size: dict[str, Any]
    run: Callable[[], torch.Tensor]

    @property
    def shape(self) -> dict[str, Any]:
        """The size of its pictures."""
        return {name: self.size[name] for name in ("height", "width")}


def pictures(folder: Path) -> Case:
    pipe = fits.small(folder)
    size = {"height": 64, "width": 64}

    def call() -> torch.Tensor:
        return pipe("a boat", **size, num_inference_steps=2, generator=tiny.seeded(0), output_type="pt").images

    pipe.set_progress_bar_config(disable=True)
    return Case(pipe, {**size, "steps": 2, "output": "pt"}, call)


def clips(folder: Path) -> Case:
    pipe = tiny_video.pipeline(folder)
    size = {"height": 32, "width": 48}

    def call() -> torch.Tensor:
        made = pipe("a boat", **size, num_frames=9, num_inference_steps=2, generator=tiny.seeded(0), output_type="pt")
        return made.frames

    pipe.set_progress_bar_config(disable=True)
    return Case(pipe, {**size, "frames": 9, "steps": 2, "output": "pt"}, call)


def guest(folder: Path) -> Case:
    family = FAMILIES["ZImage"]()
    return Case(family.pipeline, family.call, lambda: run(family))


CASES = {"pictures": pictures, "clips": clips, "guest": guest}


@pytest.fixture(scope="module", params=["clips", "guest", pytest.param("pictures", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return CASES[request.param](tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def plain(case: Case) -> torch.Tensor:
    """On the device, with all weights there."""
    with simulated():
        case.pipeline.to(DEVICE)
        made = case.run().cpu()
        case.pipeline.to("cpu")
    return made


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_stream, "STAGE_BYTES", 2**12)


SLOW = pytest.mark.slow
MODES = [
    pytest.param(False, False, id="late"),
    pytest.param(False, True, id="late, pinned", marks=SLOW),
    pytest.param(True, False, id="early", marks=SLOW),
    pytest.param(True, True, id="early, pinned", marks=SLOW),
]


@pytest.mark.parametrize(("early", "pins"), MODES)
def test_the_same_within_every_budget(case: Case, plain: torch.Tensor, *, early: bool, pins: bool) -> None:
    with simulated(early=early, pins=pins) as sim:
        for vram in budgets(case):
            plan = lowtide.fit(case.pipeline, vram=vram, ram="40GB", device=DEVICE, **case.size)
            made = case.run().cpu()
            assert torch.equal(made, plain) or plan.exactness != "equal bits"
            assert torch.allclose(made, plain, rtol=0, atol=1e-5)
        lowtide.unfit(case.pipeline)
        assert sim.devices[0].counts.launches == 0, "nothing was done on the current device by accident"


def budgets(case: Case) -> list[int | str]:
    with pytest.raises(BudgetError) as refusal:
        lowtide.fit(case.pipeline, vram=1000, ram="40GB", device=DEVICE, **case.size)
    least = refusal.value.minimum.vram
    assert least is not None
    return [least, least + weights_of(case.pipeline) // 2]


QUICK = {("pictures", "leaf", "host", "fp8"), ("clips", "block", "host", "int8"), ("guest", "leaf", "disk", None)}
RULES = [
    pytest.param(*rule, marks=() if rule in QUICK else SLOW)
    for rule in product(CASES, ("whole", "block", "leaf"), ("host", "disk"), CAST)
]


@pytest.mark.parametrize(("name", "level", "rest", "casting"), RULES)
def test_the_same_under_every_rule(name: str, level: str, rest: str, casting: str | None, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    networks = list(networks_of(case.pipeline).values())
    for network in networks if casting is not None else ():
        apply_casting(network, CAST[casting])
    with simulated():
        case.pipeline.to(DEVICE)
        expected = case.run().cpu()
        case.pipeline.to("cpu")
        for network in networks:
            prefetch = 0 if level == "whole" else 1
            apply_residency(network, rest=rest, level=level, prefetch=prefetch, device=DEVICE)
        for _ in range(2):
            assert torch.equal(case.run().cpu(), expected)


@pytest.mark.parametrize("name", ["clips", pytest.param("pictures", marks=SLOW)])
def test_the_host_waits_for_the_device_at_the_ends_of_stages_only(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    during: list[int] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        during.append(len(sim.devices[1].counts.waits))
        return tensors

    with simulated() as sim:
        case.pipeline.to(DEVICE)
        case.pipeline("a boat", num_inference_steps=4, output_type="latent", callback_on_step_end=look, **case.shape)
    assert len(during) == 4
    assert len(set(during[1:])) == 1, sim.devices[1].counts.waits


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_stream_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = "disk" if name == "_through_stage" else "host"
    monkeypatch.setattr(DeviceStream, name, MUTANTS[name])
    with pytest.raises((AssertionError, NotFiniteWarning)):
        test_the_same_under_every_rule("clips", "leaf", rest, None, tmp_path)
