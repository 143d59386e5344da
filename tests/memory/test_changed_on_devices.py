"""A rule is replaced in the middle, on an accelerator: what the old one had begun is waited for. On the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.sim_streams import ordered
from tests.sim_tensor import simulated
from torch import nn

from lowtide.memory import apply_residency, detach, device_stream
from lowtide.memory.device_stream import DeviceStream
from lowtide.weights.page_map import PAGE

DEVICE = torch.device("sim", 1)
OUT_OF_MEMORY = torch.OutOfMemoryError("SIM out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_stream, "STAGE_BYTES", PAGE // 4)


class Failing(nn.Module):
    """Raises once, when it is told to."""

    error: BaseException | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return x


def blocks() -> tuple[nn.Module, Failing]:
    torch.manual_seed(0)
    failing = Failing()
    layers = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(6)]
    layers[2].append(failing)
    return nn.Sequential(*layers).eval(), failing


def shrinks_in_the_middle(*, early: bool, pins: bool, rest: str) -> None:
    """Copies of three units are under way when a call fails; the next one is under a rule that takes less."""
    with simulated(early=early, pins=pins) as sim, ordered(sim), torch.no_grad():
        module, failing = blocks()
        x = torch.randn(3, 16)
        plain = module(x)
        apply_residency(module, 4000, prefetch=3, rest=rest, device=DEVICE, level="block")
        module(x)
        failing.error = OUT_OF_MEMORY
        with pytest.raises(torch.OutOfMemoryError):
            module(x)
        for level, share, prefetch in (("block", 2000, 1), ("leaf", 0, 1), ("leaf", 0, 0)):
            apply_residency(module, share, prefetch=prefetch, rest=rest, device=DEVICE, level=level)
            for _ in range(2):
                assert torch.equal(module(x).cpu(), plain)
        detach(module)
        assert torch.equal(module(x), plain)


@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_no_memory_is_released_while_a_copy_may_write_to_it(*, early: bool, pins: bool, rest: str) -> None:
    shrinks_in_the_middle(early=early, pins=pins, rest=rest)


def waits_for_no_copy(self: DeviceStream, load: Any) -> None:
    load.buffer.free = self._computing().record_event()


MUTANTS: dict[str, Callable[..., None]] = {"waits for no copy": waits_for_no_copy}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStream, "_release", MUTANTS[name])
    with pytest.raises(AssertionError):
        shrinks_in_the_middle(early=False, pins=True, rest="host")
