"""Pinned memory: one limit for all of it, nothing pinned longer than it is used, and a failed pin costs speed alone."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from tests.forked import in_child
from tests.lines import interrupted, places
from tests.sim_device import Sim
from tests.sim_tensor import simulated
from torch import nn

from lowtide.machine import pinned_memory
from lowtide.machine.device_kinds import Cuda
from lowtide.machine.pinned_memory import HostBuffer, _Books, most_pinned
from lowtide.memory import apply_residency, detach, device_stream
from lowtide.weights.page_map import PAGE

DEVICE = torch.device("sim", 1)


@pytest.fixture
def books(monkeypatch: pytest.MonkeyPatch) -> _Books:
    """Of nothing else in this process."""
    monkeypatch.setattr(pinned_memory, "PINNED", _Books())
    monkeypatch.setattr(device_stream, "STAGE_BYTES", PAGE // 4)
    return pinned_memory.PINNED


@pytest.fixture
def sim(books: _Books) -> Iterator[Sim]:
    with simulated() as sim, torch.no_grad():
        yield sim
        gc.collect()
        assert books.nbytes == sim.pinned


def limited(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(_Books, "limit", nbytes)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))).eval()


def total(module: nn.Module) -> int:
    return sum(-(-weight.nbytes // 256) * 256 for weight in module.parameters())


def check(module: nn.Module, times: int = 3) -> None:
    x = torch.ones(2, 16)
    expected = blocks()(x)
    for _ in range(times):
        assert torch.equal(module(x).cpu(), expected)


def test_one_limit_for_all_that_is_pinned(sim: Sim, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [blocks() for _ in range(3)]
    most = int(1.5 * total(modules[0])) + 2 * device_stream.STAGE_BYTES
    limited(monkeypatch, most)
    for module in modules:
        apply_residency(module, device=DEVICE)
    for module in modules:
        check(module)  # with buffers for what is not pinned, which count too
        assert total(modules[0]) < sim.pinned <= most
    apply_residency(modules[0], device=DEVICE, rest="disk")
    apply_residency(modules[2], device=DEVICE)
    assert sim.pinned > most - total(modules[0]) // 6, "what one gives back another has"
    check(modules[2])


def test_the_limit_is_that_of_the_machine_or_its_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowtide.machine import host

    monkeypatch.setattr(pinned_memory, "host_memory", lambda: host.HostMemory(1000, 10, limited=True))
    assert pinned_memory.PINNED.limit == 500
    assert most_pinned("cuda") == 500
    assert most_pinned("xpu") == most_pinned("mps") == most_pinned("cpu") == 0


@pytest.mark.parametrize("rest", ["host", "disk"])
def test_a_pin_that_fails_costs_speed_alone(sim: Sim, rest: str) -> None:
    module = blocks()

    def use() -> None:
        apply_residency(module, device=DEVICE, rest=rest)
        check(module)

    sim.fail("pin", RuntimeError("CUDA error: out of memory"))
    with pytest.warns(UserWarning, match="could not be pinned"):
        use()
    assert sim.pinned > 0, "the others are"


@pytest.mark.parametrize("rest", ["host", "disk"])
def test_nothing_is_pinned_once_a_rule_has_ended(sim: Sim, rest: str) -> None:
    module = blocks()
    attachment = apply_residency(module, device=DEVICE, rest=rest)
    units = attachment.units  # somebody may hold on to them
    check(module)
    assert sim.pinned > 0
    apply_residency(module, device=DEVICE, level="whole", prefetch=0, rest=rest)
    assert sim.pinned in (0, total(module))
    check(module)
    detach(module)
    assert sim.pinned == 0
    check(module)
    assert units


def test_nothing_is_pinned_once_a_rule_could_not_begin(sim: Sim) -> None:
    module = blocks()
    sim.fail("allocation", torch.OutOfMemoryError("SIM out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        apply_residency(module, 2000, device=DEVICE)
    gc.collect()
    assert sim.pinned == 0
    check(module)


def test_what_is_dropped_without_a_word_is_unpinned(sim: Sim) -> None:
    module = blocks()
    apply_residency(module, device=DEVICE)
    module(torch.ones(2, 16))
    del module
    gc.collect()
    assert sim.pinned == 0


@pytest.mark.parametrize("share", [0.5, 1])
def test_nothing_that_stays_is_pinned(sim: Sim, share: float) -> None:
    module = blocks()
    apply_residency(module, int(share * total(module)), device=DEVICE)
    buffers = 2 * device_stream.STAGE_BYTES
    assert sim.pinned <= (1 - share) * total(module) + buffers
    check(module)
    assert sim.pinned <= (1 - share) * total(module) + buffers


def copied_from(sim: Sim) -> HostBuffer:
    """A buffer from which a copy is under way."""
    buffer = HostBuffer(1024, DEVICE, sim)
    target = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    copier = sim.new_stream(DEVICE)
    copier.wait_event(sim.computing(DEVICE).record_event())
    with sim.on(DEVICE, copier):
        target.copy_(buffer.flat, non_blocking=True)
        buffer.used = copier.record_event()
    return buffer


def test_memory_is_unpinned_after_the_last_copy_from_it(sim: Sim) -> None:
    copied_from(sim).unpin()
    assert sim.pinned == 0
    assert not sim.problems


def test_memory_that_is_not_pinned_is_freed_after_the_last_copy_from_it_too(books: _Books) -> None:
    """Not every device has read it when the call returns, as those of CUDA have."""
    with simulated(pins=False) as sim:
        buffer = copied_from(sim)
        assert not buffer.is_pinned
        (copier,) = sim.of(DEVICE).copiers
        assert copier.sources
        del buffer
        assert not copier.sources


def test_it_is_seen_where_nobody_waits_for_the_last_copy(books: _Books) -> None:
    with simulated() as sim:
        buffer = copied_from(sim)
        buffer.used = None
        buffer.unpin()
        assert sim.problems == ["memory is unpinned, and a copy from it has yet to be made"]
        sim.devices[0].counts.problems.clear()


def test_a_child_counts_nothing_and_unpins_nothing_of_its_parent(sim: Sim, books: _Books) -> None:
    buffer = HostBuffer(1024, DEVICE, sim)

    def child() -> torch.Tensor:
        counted = books.nbytes
        buffer.unpin()
        return torch.tensor([counted, sim.pinned, buffer.is_pinned])

    assert in_child(child).tolist() == [0, 1024, 0]
    assert buffer.is_pinned
    assert books.nbytes == 1024


@pytest.mark.parametrize("pins", [True, False])
def test_a_child_waits_for_no_copy_of_its_parent(books: _Books, *, pins: bool) -> None:
    with simulated(pins=pins) as sim:
        buffer = copied_from(sim)
        (copier,) = sim.of(DEVICE).copiers

        def child() -> torch.Tensor:
            buffer.unpin()
            return torch.tensor(len(copier.sources))

        assert in_child(child).item() == 1


def test_threads_do_not_exceed_the_limit_together(sim: Sim, books: _Books, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 64 * 100)
    kept: list[HostBuffer] = []
    start = threading.Barrier(4)

    def pin() -> None:
        start.wait()
        for _ in range(50):
            buffer = HostBuffer(64, DEVICE, sim)
            assert sim.pinned <= 64 * 100
            kept.append(buffer)

    threads = [threading.Thread(target=pin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 200
    assert sim.pinned == books.nbytes == 64 * 100
    kept.clear()
    gc.collect()
    assert sim.pinned == books.nbytes == 0


def test_an_interrupt_leaves_nothing_pinned(sim: Sim, books: _Books) -> None:
    def use() -> None:
        HostBuffer(1024, DEVICE, sim).unpin()

    for place in places(use, ("machine/pinned_memory", "machine/accelerators")):
        if place.line == HostBuffer.__del__.__code__.co_firstlineno + 1:
            continue  # Python raises nothing out of a `__del__`
        assert interrupted(use, place), str(place)
        gc.collect()
        assert sim.pinned == books.nbytes == 0, str(place)
        torch.ones(1, device=DEVICE)  # raises no error of before


def test_cuda_registers_the_very_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
            assert flags == 1, "for all devices"
            error = 712 if address in registered else 0
            registered.setdefault(address, nbytes)
            return error

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            return 713 if registered.pop(address, None) is None else 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    flat, kind = torch.empty(1000, dtype=torch.uint8), Cuda("cuda")
    assert kind._register(flat)
    assert registered == {flat.data_ptr(): 1000}
    assert not kind._register(flat)
    assert kind._unregister(flat)
    assert not kind._unregister(flat)
