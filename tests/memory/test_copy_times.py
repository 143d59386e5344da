"""A step on the stand-in's clock takes as long as the planner's queue of copies says."""

from __future__ import annotations

import pytest
import torch
from tests.sim_tensor import simulated
from torch import nn

from lowtide.memory import apply_residency
from lowtide.memory.bounds import aligned, places
from lowtide.planning.copy_queue import Turn, behind_by_place, behind_in_ring, step_seconds

DEVICE = torch.device("sim", 1)
SIZES = (700, 300, 100, 200, 900, 100, 100, 800, 64, 500)
"""Numbers of each unit's weight."""
TIMES = (3, 9, 1, 1, 2, 7, 7, 1, 12, 2)
"""Kernels of each unit."""


class Works(nn.Module):
    """Starts so many kernels."""

    def __init__(self, size: int, times: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size), requires_grad=False)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x + self.weight[0]
        return x


def clocked(rule: dict[str, int], byte_seconds: float, staying: tuple[int, ...] = ()) -> float:
    """Seconds of a step."""
    torch.manual_seed(0)
    with simulated() as sim, torch.no_grad():
        sim.byte_seconds = byte_seconds
        module = nn.Sequential(*(Works(size, times) for size, times in zip(SIZES, TIMES, strict=True)))
        x = torch.randn(4)
        plain = module(x)
        apply_residency(module, rest="host", level="leaf", device=DEVICE, **rule)
        given, marks = x.to(DEVICE), []
        for _ in range(8):
            out = module(given)
            marks.append(sim.timed_event(DEVICE))
        assert torch.equal(out.cpu(), plain)
    return marks[4].elapsed_time(marks[7]) / 1000 / 3


BYTES = [aligned(4 * size) for size in SIZES]


def modelled(behind: list[int], byte_seconds: float) -> float:
    copies = [nbytes * byte_seconds for nbytes in BYTES]
    return step_seconds(
        [Turn(copy, times * 1e-6, behind=back) for copy, times, back in zip(copies, TIMES, behind, strict=True)]
    )


@pytest.mark.parametrize("byte_seconds", [1e-10, 1e-9, 3e-9, 1e-8])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_a_ring_of_units(prefetch: int, byte_seconds: float) -> None:
    expected = modelled(behind_in_ring(len(SIZES), prefetch + 1), byte_seconds)
    assert clocked({"prefetch": prefetch}, byte_seconds) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("byte_seconds", [1e-10, 1e-9, 3e-9, 1e-8])
@pytest.mark.parametrize("room", [3840, 5000, 7680, 11000, 20000])
def test_a_ring_of_bytes(room: int, byte_seconds: float) -> None:
    expected = modelled(behind_by_place(places(BYTES, room), BYTES), byte_seconds)
    assert clocked({"prefetch_bytes": room}, byte_seconds) == pytest.approx(expected, rel=1e-9)


def test_small_units_leave_room_for_more_ahead_in_as_many_bytes() -> None:
    slower = clocked({"prefetch": 1}, 3e-9)
    assert clocked({"prefetch_bytes": 2 * max(BYTES)}, 3e-9) < 0.9 * slower
