"""Modules called under streams that a user chooses, as with `torch.cuda.stream(other)`: nothing is used too early.

Neither buffers, nor dequantized weights, nor the memory of either once it is freed. On the stand-in.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tests.sim_device import Sim, SimStream
from tests.sim_streams import ordered, other_stream
from tests.sim_tensor import simulated
from torch import nn

from lowtide.casting.apply_casting import apply_casting
from lowtide.casting.cast_leaf import Leaf
from lowtide.casting.casting import Casting
from lowtide.casting.scratch import SCRATCH, Scratch
from lowtide.machine.pinned_memory import HostBuffer
from lowtide.memory import apply_residency, detach, device_stream
from lowtide.memory.device_stream import DeviceStream

DEVICE = torch.device("sim", 1)
INT8 = Casting("int8")


@pytest.fixture(autouse=True)
def nothing_kept() -> Any:
    SCRATCH.release()
    yield
    SCRATCH.release()


def blocks() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(4)]
    return nn.Sequential(nn.Linear(16, 16), *block).eval()


class Turns:
    """Calls under the usual stream and under two of the user's, in turn. Only inputs are waited for."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.streams = [sim.computing(DEVICE), other_stream(sim, DEVICE), other_stream(sim, DEVICE)]
        self.made: list[torch.Tensor] = []

    def on(self, stream: SimStream) -> AbstractContextManager[None]:
        return self.sim.on(DEVICE, None if stream is self.streams[0] else stream)

    def call(self, module: nn.Module, x: torch.Tensor, order: tuple[int, ...] = (0, 1, 2, 0, 0, 1)) -> None:
        for place in order:
            with self.on(self.streams[place]):
                self.made.append(module(x))

    def same(self, expected: torch.Tensor) -> bool:
        self.sim.synchronize(DEVICE)
        return all(torch.equal(made.cpu(), expected) for made in self.made)


def cast_weights_in_turns() -> None:
    with simulated() as sim, ordered(sim), torch.no_grad():
        module, x = blocks().to(DEVICE), torch.randn(3, 16).to(DEVICE)
        apply_casting(module, INT8)
        expected = module(x).cpu()
        sim.synchronize(DEVICE)
        turns = Turns(sim)
        turns.call(module, x)
        SCRATCH.release()
        assert turns.same(expected)


def test_dequantized_weights_are_not_written_over_for_another_stream() -> None:
    cast_weights_in_turns()


def test_a_leaf_asks_for_the_stream_when_it_begins_and_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated() as sim, torch.no_grad():
        module, x = nn.Sequential(nn.Linear(16, 16)).eval().to(DEVICE), torch.randn(3, 16).to(DEVICE)
        apply_casting(module, INT8)
        asked, computing = [], sim.computing
        monkeypatch.setattr(sim, "computing", lambda device: asked.append(device) or computing(device))
        module(x)
        assert len(asked) == 2


def test_a_graph_has_memory_of_its_own_for_weights_that_are_dequantized_in_it() -> None:
    """It is replayed long after: neither what was there before may be in it, nor may others have what is."""
    with simulated() as sim, torch.no_grad():
        module, x = blocks().to(DEVICE), torch.randn(3, 16).to(DEVICE)
        apply_casting(module, INT8)
        expected = module(x).cpu()
        (kept,) = SCRATCH._free.values()
        lent: list[int] = []
        next(module.children()).register_forward_pre_hook(
            lambda layer, _: lent.append(layer.weight.untyped_storage().data_ptr())
        )
        sim.captures = True
        captured = module(x)
        assert lent != [kept[0].untyped_storage().data_ptr()]
        assert list(SCRATCH._free.values()) == [kept]
        SCRATCH.release()
        assert torch.equal(module(x).cpu(), captured.cpu())
        assert not SCRATCH._free
        sim.captures = False
        assert torch.equal(module(x).cpu(), expected)


def rules_in_turns(level: str, rest: str, casting: Casting | None, share: int) -> None:
    with simulated() as sim, ordered(sim), torch.no_grad():
        module, x = blocks(), torch.randn(3, 16)
        if casting is not None:
            apply_casting(module, casting)
        expected = module(x)
        turns = Turns(sim)
        prefetch = 0 if level == "whole" else 2
        with turns.on(turns.streams[1]):
            attachment = apply_residency(module, share, prefetch=prefetch, rest=rest, device=DEVICE, level=level)
        turns.call(module, x)
        with attachment.stream.held():
            turns.call(module, x)
        with turns.on(turns.streams[2]):
            detach(module)
        assert turns.same(expected)


@pytest.mark.parametrize("casting", [None, INT8])
@pytest.mark.parametrize("rest", ["host", "disk"])
@pytest.mark.parametrize(("level", "share"), [("block", 0), ("block", 4000), ("leaf", 0), ("whole", 0)])
def test_buffers_are_used_in_order_under_every_rule(level: str, share: int, rest: str, casting: Casting | None) -> None:
    if casting is None or rest == "host":
        rules_in_turns(level, rest, casting, share)


def test_two_calls_of_one_leaf_at_once_under_two_streams() -> None:
    with simulated() as sim, ordered(sim), torch.no_grad():
        module, x = nn.Sequential(nn.Linear(16, 16)).eval().to(DEVICE), torch.randn(3, 16).to(DEVICE)
        apply_casting(module, INT8)
        sim.synchronize(DEVICE)
        turns, forward = Turns(sim), module[0].forward
        inside, first_is_done = threading.Barrier(2, timeout=60), threading.Event()

        def both(given: torch.Tensor) -> torch.Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.wait()
                assert first_is_done.wait(60)
                return forward(given)
            inside.wait()
            return forward(given)

        module[0].forward = both  # type: ignore[method-assign]
        second = threading.Thread(target=turns.call, args=(module, x, (1,)))
        second.start()
        turns.call(module, x, (0,))
        first_is_done.set()
        second.join()
        SCRATCH.release()
        turns.sim.synchronize(DEVICE)
        assert torch.equal(turns.made[0].cpu(), turns.made[1].cpu())


def forgotten_in_the_middle() -> None:
    """A module goes once all that was asked for has been asked of the copy stream, and nobody has waited for it."""
    with simulated(pins=False) as sim, ordered(sim), torch.no_grad():
        module, x = blocks(), torch.randn(3, 16)
        stream = apply_residency(module, prefetch=2, rest="host", device=DEVICE, level="block").stream
        for _ in range(2):  # from the second one on there is an order to look ahead in
            module(x)
        ahead = [load.reading for load in stream._live.values() if load.reading is not None]
        for reading in ahead:
            reading.wait()
        assert len(ahead) == 2
        kept, until = weakref.ref(stream), time.monotonic() + 60
        del module, stream
        while kept() is not None and time.monotonic() < until:  # the reader lets go of its last load just after its end
            gc.collect()
        if kept() is not None:
            pytest.fail("something keeps the module")


def forgotten_without_its_stages() -> None:
    """The memory that copies come from waits for them too, where it is freed before that which they go to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostBuffer, "unpin", lambda _: None)
        forgotten_in_the_middle()


def test_a_module_that_nobody_has_any_more_leaves_no_copy_to_freed_memory() -> None:
    """What was loaded ahead for a next call may be on its way when the module goes."""
    forgotten_in_the_middle()
    forgotten_without_its_stages()


# ---- that these tests would see it


def one_buffer_for_all(self: Scratch, nbytes: int, device: torch.device, stream: Any) -> torch.Tensor:
    kept = self._free.pop(device, None)
    return TAKE(self, nbytes, device, stream) if kept is None or kept[0].numel() < nbytes else kept[0]


def no_waiting_between(self: DeviceStream) -> Any:
    return self._accelerator.computing(self.device)


def owners_do_not_wait(self: DeviceStream, load: Any) -> None:
    owners, self._owners = self._owners, []
    RELEASE(self, load)
    self._owners = owners


def blocks_in_turns() -> None:
    rules_in_turns("block", "host", None, 0)


def whole_in_turns() -> None:
    rules_in_turns("whole", "host", None, 0)


TAKE, RELEASE = Scratch.take, DeviceStream._release
MUTANTS: dict[str, tuple[Any, str, Any, Callable[[], None]]] = {
    "one buffer for all streams": (Scratch, "take", one_buffer_for_all, cast_weights_in_turns),
    "owners of buffers do not wait": (DeviceStream, "_release", owners_do_not_wait, blocks_in_turns),
    "nobody waits for what was forgotten": (
        device_stream,
        "_wait_for_copies",
        lambda *_: None,
        forgotten_without_its_stages,
    ),
    "whole: no waiting between streams": (DeviceStream, "_computing", no_waiting_between, whole_in_turns),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, mutant, goes_wrong = MUTANTS[name]
    monkeypatch.setattr(owner, method, mutant)
    with pytest.raises(AssertionError):
        goes_wrong()


def test_a_mutant_of_a_leaf_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaf, "_other_stream", lambda _: None)
    with pytest.raises(AssertionError):
        test_two_calls_of_one_leaf_at_once_under_two_streams()
