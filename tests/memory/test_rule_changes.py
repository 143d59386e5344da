"""One rule after another: nothing of the one before stays in memory, on a CPU and beside an accelerator."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.sim_device import Sim
from tests.sim_tensor import simulated
from torch import nn

from lowtide.machine.heap import steady_malloc, trim_heap
from lowtide.memory import Attachment, apply_residency, attachment_of, detach, device_stream
from lowtide.memory.placeholder import AtRest
from lowtide.memory.weight import Weight

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")

WIDTH = 724  # a weight of 2 MiB
CHANGES = [
    {"rest": "host"},
    {"rest": "host", "level": "leaf"},
    {"rest": "disk"},
    {"rest": "host", "level": "whole", "prefetch": 0},
    {"rest": "host", "resident_bytes": "8MB"},
    {"rest": "disk", "level": "leaf"},
    {"rest": "host", "blocks_per_group": 2},
    {"rest": "disk", "resident_bytes": "8MB"},
    {"rest": "host", "host_bytes": "8MB"},
    {"rest": "host"},
]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sim]:
    """An accelerator is here, a stand-in whose memory is the host's."""
    monkeypatch.setattr(device_stream, "STAGE_BYTES", 2**18)
    with simulated(early=True) as sim:
        small = nn.Linear(2, 2)
        apply_residency(small, device="sim")
        small(torch.zeros(1, 2))  # PyTorch imports more at the first call on such a device
        del small
        yield sim
        gc.collect()
        assert sim.pinned == 0


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.SiLU()) for _ in range(12)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*block)).eval().requires_grad_(False)


def total(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    trim_heap()
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Anonymous:" in line)
    return int(line.split()[1]) * 1024


def change_rules(module: nn.Module, x: torch.Tensor, seen: Callable[[], None], device: str) -> None:
    expected = module(x)
    for change in CHANGES:
        apply_residency(module, device=device, **change)
        assert torch.equal(module(x).cpu(), expected), change
        seen()
    detach(module)
    assert torch.equal(module(x), expected)
    seen()


def check_flat(sim: Sim | None) -> None:
    steady_malloc()
    module, x = blocks(), torch.randn(2, WIDTH)
    nbytes = total(module)
    module(x)
    before = anonymous() - nbytes
    most_pinned = 0

    def seen() -> None:
        nonlocal most_pinned
        attachment = attachment_of(module)
        bound = 0 if attachment is None else attachment.bound
        assert anonymous() - before <= nbytes + bound + 4 * 2**20
        most_pinned = max(most_pinned, 0 if sim is None else sim.pinned)
        assert most_pinned <= nbytes + 2**20

    change_rules(module, x, seen, "cpu" if sim is None else "sim")
    assert sim is None or most_pinned > nbytes / 2, "what is counted was there"


def test_memory_stays_flat_beside_an_accelerator(beside: Sim) -> None:
    check_flat(beside)


def test_memory_stays_flat_on_a_cpu() -> None:
    check_flat(None)


def test_weights_that_go_to_disk_leave_memory() -> None:
    steady_malloc()
    module = blocks()
    nbytes, before = total(module), anonymous()
    apply_residency(module, rest="disk", device="cpu")
    assert anonymous() < before - 0.8 * nbytes


@pytest.mark.parametrize("is_beside_an_accelerator", [False, True])
def test_nothing_of_a_dropped_weight_is_alive(
    request: pytest.FixtureRequest, *, is_beside_an_accelerator: bool
) -> None:
    """Somebody may hold on to an attachment: it lets its weights go."""
    if is_beside_an_accelerator:
        request.getfixturevalue("beside")
    module, x = blocks(), torch.randn(2, WIDTH)
    dropped: list[weakref.ref[object]] = []
    kept: list[Attachment] = []

    def seen() -> None:
        gc.collect()
        assert [ref() for ref in dropped if ref() is not None] == []
        attachment = attachment_of(module)
        if attachment is not None:
            kept.append(attachment)
            held: list[Weight | nn.Parameter | None] = list(attachment.weights)
            dropped.extend(map(weakref.ref, [*held, *module.parameters(), *attachment.units]))

    change_rules(module, x, seen, "sim" if is_beside_an_accelerator else "cpu")
    assert len(dropped) > 100


@pytest.mark.parametrize("change", [{"rest": "host", "level": "leaf"}, {"rest": "disk"}])
def test_a_weight_of_a_rule_knows_nothing_of_the_attachment(change: dict[str, str]) -> None:
    module = blocks()
    gc.collect()
    gc.disable()
    try:
        attachment = apply_residency(module, device="cpu", **change)  # type: ignore[arg-type]
        weights = [weakref.ref(weight) for weight in attachment.weights]
        del attachment
        detach(module)
        assert [weight() for weight in weights if weight() is not None] == [], "without looking for garbage"
    finally:
        gc.enable()


def test_a_change_that_fails_midway_leaves_no_placeholders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, x = blocks(), torch.randn(2, WIDTH)
    expected = module(x)
    apply_residency(module, rest="host", device="cpu")
    real, calls = os.pwrite, 0

    def full(*args: object) -> int:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(28, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="cannot be written"):
        apply_residency(module, rest="disk", device="cpu", spill_folder=str(tmp_path))
    assert not any(isinstance(parameter, AtRest) for parameter in module.parameters())
    assert torch.equal(module(x), expected)
