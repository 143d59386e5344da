"""Every rule on an accelerator, on a stand-in that does not forgive: the same bits, and nothing used too early.

Mutants of the stream show that the stand-in catches what it is there for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.sim_device import GRAIN, Device, Event
from tests.sim_tensor import SimTensor, simulated
from tests.thinned import thinned
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.casting import Casting
from lowtide.memory import Attachment, apply_residency, detach, device_stream
from lowtide.memory.byte_ring import ByteRing
from lowtide.memory.device_stream import DeviceStream
from lowtide.memory.stream import Stream
from lowtide.weights.page_map import PAGE

DEVICE = torch.device("sim", 1)
"""Not the first, so that what asks for the current device is found out."""
LEVELS = ("block", "leaf", "whole")
MODES = [(early, pins) for early in (False, True) for pins in (False, True)]
CASTINGS = {"int8": Casting("int8"), "fp8": Casting("float8_e4m3fn", scaled=True), "int4": Casting("int4")}


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_stream, "STAGE_BYTES", PAGE // 4)


def blocks(dtype: torch.dtype = torch.float32, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    inner = width * 3 // 2
    block = [nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)) for _ in range(5)]
    return nn.Sequential(nn.Linear(width, width), nn.Sequential(*block), nn.LayerNorm(width)).eval().to(dtype)


def put(
    module: nn.Module, level: str, rest: str, share: float = 0.0, prefetch: int = 1, nbytes: int | None = None
) -> Attachment:
    resident = int(share * sum(weight.numel() * weight.itemsize for weight in module.parameters()))
    prefetch = 0 if level == "whole" else prefetch
    ahead = {"prefetch": prefetch, "prefetch_bytes": nbytes}
    return apply_residency(module, resident, rest=rest, level=level, device=DEVICE, spill_folder=None, **ahead)


def check(
    module: nn.Sequential,
    level: str,
    rest: str,
    share: float = 0,
    prefetch: int = 1,
    casting: str | None = None,
    nbytes: int | None = None,
) -> Device:
    """Under the rule, and after it, the module computes what it did before."""
    x = torch.randn(3, module[-1].normalized_shape[0])
    with torch.no_grad():
        if casting is not None:
            apply_casting(module, CASTINGS[casting])
        plain = module(x)
        attachment = put(module, level, rest, share, prefetch, nbytes)
        for _ in range(4):
            out = module(x)
            assert isinstance(out, SimTensor)
            assert out.device == DEVICE
            assert torch.equal(out.cpu(), plain)
        assert attachment.stream.ledger.peak <= attachment.bound
        assert next(module.parameters()).device == DEVICE, "the placeholders say where the module computes"
        detach(module)
        assert torch.equal(module(x), plain)
    device: Device = out.home.device
    return device


@pytest.mark.parametrize(("level", "rest", "mode"), thinned(LEVELS, ["host", "disk"], MODES, most=2))
def test_equal_under_every_rule(level: str, rest: str, mode: tuple[bool, bool]) -> None:
    early, pins = mode
    with simulated(early=early, pins=pins) as sim:
        for share in (0, 0.5):
            for prefetch in (0, 1, 3):
                check(blocks(), level, rest, share, prefetch)
        assert sim.devices[0].counts.launches == 0, "nothing was done on the current device by accident"


@pytest.mark.parametrize(("level", "rest", "mode"), thinned(LEVELS, ["host", "disk"], MODES))
def test_equal_where_bytes_limit_what_is_loaded_ahead(level: str, rest: str, mode: tuple[bool, bool]) -> None:
    early, pins = mode
    with simulated(early=early, pins=pins):
        for nbytes in (0, 5000, 9000):
            check(blocks(), level, rest, 0.3, nbytes=nbytes)


def test_a_run_of_bytes_is_allocated_once_and_no_larger_than_it_may_be() -> None:
    with simulated() as sim, torch.no_grad():
        module, x = blocks(), torch.randn(3, 16)
        attachment = put(module, "block", "host", nbytes=9000)
        before = sim.devices[1].allocated
        for _ in range(2):
            module(x)
        assert sim.devices[1].allocated - before == -(-9000 // GRAIN) * GRAIN
        assert attachment.stream.ledger.in_use == attachment.bound == 9000
        counts = sim.devices[1].counts
        copies, waits = counts.copies, len(counts.waits)
        module(x)
        assert counts.copies - copies == len(attachment.units) + 1, "and the input"
        assert len(counts.waits) == waits
        attachment.stream.rest()
        assert attachment.stream.ledger.in_use == 0


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("level", LEVELS)
def test_cast_weights_are_the_same_numbers(level: str, casting: str) -> None:
    with simulated():
        check(blocks(torch.bfloat16, 64).float(), level, "host", 0, casting=casting)


def test_a_copy_is_one_for_a_pinned_unit_and_nothing_is_allocated_in_later_steps() -> None:
    with simulated() as sim, torch.no_grad():
        module, x = blocks(), torch.randn(3, 16)
        attachment = put(module, "block", "host")
        for _ in range(2):
            module(x)
        counts = sim.devices[1].counts
        copies, allocations, waits = counts.copies, counts.allocations, len(counts.waits)
        module(x)
        assert counts.copies - copies == len(attachment.units) + 1, "and the input"
        launched = counts.allocations - allocations
        module(x)
        assert counts.allocations - allocations == 2 * launched
        assert len(counts.waits) == waits, "the host waits for nothing in a step"


@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize("pins", [False, True])
def test_a_copy_that_fails_midway_leaves_nothing_to_wait_for(rest: str, *, pins: bool) -> None:
    with simulated(pins=pins) as sim, torch.no_grad():
        module, x = blocks(), torch.randn(3, 16)
        plain = module(x)
        attachment = put(module, "block", rest)
        module(x)
        sim.fail("copy", OSError(5, "Input/output error"), after=3)
        with pytest.raises(OSError, match="Input/output error"):
            module(x)
        for _ in range(2):
            assert torch.equal(module(x).cpu(), plain)
        assert attachment.stream.ledger.peak <= attachment.bound


@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize("level", LEVELS)
def test_computing_waits_as_long_as_its_clock_says(level: str, rest: str) -> None:
    """Nothing but launches and waits for copies moves the clock of computing on."""
    assert stall_and_idle(level, rest, byte_seconds=1e-6) == pytest.approx((1, 1), rel=1e-9)
    assert stall_and_idle(level, rest, byte_seconds=0.0) == (0, 0)


def test_a_host_that_waits_for_nothing_cannot_time_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStream, "_timed_wait", Stream._timed_wait)
    with pytest.raises(AssertionError):
        assert stall_and_idle("block", "host", byte_seconds=1e-6) == pytest.approx((1, 1), rel=1e-9)


def stall_and_idle(level: str, rest: str, byte_seconds: float) -> tuple[float, float]:
    """Seconds of stalls by the ledger, and by its units, as shares of those in which computing stood idle."""
    with simulated() as sim, torch.no_grad():
        sim.byte_seconds = byte_seconds
        attachment, x = put(module := blocks(), level, rest), torch.randn(3, 16)
        module(x)
        one, ledger = sim.devices[1], attachment.stream.ledger
        ledger.reset()
        began, launches = sim.timed_event(DEVICE), one.counts.launches
        module(x)
        idle = began.elapsed_time(sim.timed_event(DEVICE)) / 1000
        idle -= (one.counts.launches - launches) * sim.launch_seconds
        stalled = ledger.stalled, sum(account.stalled for account in ledger.by_unit.values())
    return stalled if idle < 1e-12 else (stalled[0] / idle, stalled[1] / idle)


@pytest.mark.parametrize("nbytes", [None, 9000, 10**6])
@pytest.mark.parametrize("level", LEVELS)
def test_a_captured_call_of_what_comes_is_refused_by_name(level: str, nbytes: int | None) -> None:
    """Whatever is there already, and before anything is let go: CUDA waits for nothing of before in a capture."""
    with simulated() as sim, torch.no_grad():
        module, x = blocks(), torch.randn(3, 16).to(DEVICE)
        plain = module(x.cpu())
        stream = put(module, level, "host", nbytes=nbytes).stream
        with stream.held():
            for _ in range(2):
                module(x)
            there = list(stream._live)
            assert there
            called = (
                [module] if level == "whole" else [module, module[0], module[1][2] if level == "block" else module[2]]
            )
            for part in called:
                sim.captures = True
                with pytest.raises(RuntimeError, match=r"Sequential\.\S+ comes when .* is captured in a graph"):
                    part(x)
                sim.captures = False
                assert list(stream._live) == there
            assert torch.equal(module(x).cpu(), plain)


def test_a_captured_call_of_what_stays_works() -> None:
    with simulated() as sim, torch.no_grad():
        module, x = blocks(), torch.randn(3, 16).to(DEVICE)
        plain = module(x.cpu())
        put(module, "block", "host", share=2)
        sim.captures = True
        assert torch.equal(module(x).cpu(), plain)


# ---- what the stand-in is there for


def waits_for_nothing(self: DeviceStream, load: Any) -> None:
    if load.reading is not None:
        load.reading.wait()


def overwrites_too_early(self: DeviceStream, load: Any) -> None:
    load.buffer.free = Event(self._computing(), 0)
    BEGIN(self, load)


def stage_used_again_at_once(self: DeviceStream, rest: Any, target: torch.Tensor, start: int) -> None:
    for stage in self._stages:
        stage.used = SimpleEvent()
    THROUGH(self, rest, target, start)


class SimpleEvent:
    def synchronize(self) -> None:
        """Not even once."""


def frees_before_use(self: DeviceStream, load: Any) -> None:
    before = None if load.buffer is None else load.buffer.free
    RELEASE(self, load)
    if load.buffer is not None:
        load.buffer.free = before


BEGIN, THROUGH, RELEASE = DeviceStream._begin, DeviceStream._through_stage, DeviceStream._release
MUTANTS: dict[str, Callable[..., None]] = {
    "_wait": waits_for_nothing,
    "_begin": overwrites_too_early,
    "_through_stage": stage_used_again_at_once,
    "_release": frees_before_use,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStream, name, MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all()


def forgets_its_neighbours(self: ByteRing, unit: Any, buffer: Any) -> Any:
    return buffer.free


def finds_room_everywhere(self: ByteRing, unit: Any) -> frozenset[Any]:
    return frozenset([unit])


BYTE_MUTANTS: dict[str, Callable[..., Any]] = {"freed": forgets_its_neighbours, "_overlapping": finds_room_everywhere}


@pytest.mark.parametrize("name", BYTE_MUTANTS)
def test_a_mutant_of_the_run_of_bytes_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteRing, name, BYTE_MUTANTS[name])
    with pytest.raises(AssertionError):
        check_bytes()


def check_bytes() -> None:
    with simulated():
        for level in LEVELS:
            check(blocks(), level, "host", nbytes=5000)


def check_all() -> None:
    with simulated():
        for level in LEVELS:
            for rest in ("host", "disk"):
                check(blocks(), level, rest)
