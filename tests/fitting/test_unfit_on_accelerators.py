"""A budget beside an accelerator, given and taken back: nothing of it is left. On the stand-in."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import fits
from tests.fitting.traced_once import traced_once  # noqa: F401
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS
from tests.sim_device import GENERATORS
from tests.sim_tensor import simulated

import lowtide
from lowtide.guests.networks import networks_of
from lowtide.memory.rule_changes import attachment_of
from lowtide.weights.slots import slots

pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]
DEVICE = torch.device("sim", 1)
TABLES = 2**13
"""Bytes of timesteps and of rotations that a call leaves on the device, with a budget or without."""


def pictures(folder: Path) -> tuple[Any, dict[str, Any], Callable[[], torch.Tensor]]:
    pipe, size = fits.load(fits.checkpoint(folder, "pictures"), "pictures"), {"height": 64, "width": 64}
    call = {**size, "num_images_per_prompt": 1, "generator": None, "num_inference_steps": 2}
    return pipe, {**size, "pictures": 1}, lambda: fits.make(pipe, **call)


def guest(_: Path) -> tuple[Any, dict[str, Any], Callable[[], torch.Tensor]]:
    pytest.importorskip("diffusers")
    family = FAMILIES["ZImage"]()
    return family.pipeline, family.call, lambda: run(family)


SLOW = pytest.mark.slow


def states() -> list[torch.Tensor]:
    return [generator.get_state() for generator in (torch.default_generator, *GENERATORS)]


def tensors_of(pipe: Any) -> dict[str, torch.Tensor]:
    networks = networks_of(pipe).items()
    return {f"{name}.{slot.name}": slot.tensor for name, network in networks for slot in slots(network)}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (pictures, "sim:1"),
        (guest, "cpu"),
        pytest.param(pictures, "cpu", marks=SLOW),
        pytest.param(guest, "sim:0", marks=SLOW),
    ],
)
def test_everything_is_as_it_was(kind: Any, given: str, tmp_path: Path) -> None:
    with simulated() as sim:
        pipe, size, make = kind(tmp_path)
        pipe.to(given)
        numbers = {name: (tensor.device, tensor.dtype, tensor.cpu()) for name, tensor in tensors_of(pipe).items()}
        gc.collect()
        allocated, drawing = [device.allocated for device in sim.devices], states()
        lowtide.fit(pipe, vram="40MB", ram="40GB", device=DEVICE, **size)
        assert all(map(torch.equal, states(), drawing)), "to plan draws nothing"
        make()
        drawing = states()
        lowtide.unfit(pipe)
        assert all(map(torch.equal, states(), drawing)), "nor does taking it back"
        assert sim.pinned == 0
        assert not any(attachment_of(network) for network in networks_of(pipe).values())
        now = tensors_of(pipe)
        assert now.keys() == numbers.keys()
        for name, (device, dtype, values) in numbers.items():
            assert (now[name].device, now[name].dtype) == (device, dtype), name
            assert torch.equal(now[name].cpu(), values), name
        del now
        gc.collect()
        more = [device.allocated - before for device, before in zip(sim.devices, allocated, strict=True)]
        assert all(0 <= nbytes <= TABLES for nbytes in more), more
        if given != "cpu":
            make()
            assert sim.pinned == 0
