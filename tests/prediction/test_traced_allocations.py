"""What a caching allocator needs for a traced call: the same whether modules are gone through or repeated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowtide.planning.workload import Call
from lowtide.prediction import tracing
from lowtide.prediction.caching_allocator import FREED, CachingAllocator
from lowtide.prediction.driving import drive
from lowtide.prediction.repeated_modules import closed
from lowtide.prediction.traced_memory import Memory
from lowtide.prediction.tracing import trace

MIB = 2**20


class Blocks(nn.Module):
    """`[1, 4096, 1024]` in half precision, which are 8 MiB, and four times as many inside."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def call(count: int, device: str = "cuda") -> Call:
    with torch.device("meta"):
        network, x = Blocks(count).half(), torch.empty(1, 4096, 1024, dtype=torch.float16)
    return trace(lambda: network(x), [network], [x], device=device).call


def test_one_block_by_hand() -> None:
    """8 MiB of input lie in a segment of 20, two of 32 are beside it, and the result fits behind the input."""
    one = call(1)
    assert one.peak == (8 + 32 + 32) * MIB
    assert one.spare == (20 + 32 + 32) * MIB - one.peak


def test_two_blocks_by_hand() -> None:
    """The first sum was put into one of 32, so the second block needs one more."""
    two = call(2)
    assert two.peak == (8 + 8 + 32 + 32) * MIB
    assert two.spare == (20 + 3 * 32) * MIB - two.peak


def test_a_cpu_has_no_such_allocator() -> None:
    assert call(2, "cpu").spare == 0


@pytest.mark.parametrize("count", [2, 5])
def test_repeated_modules_need_what_they_did(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = call(count)
    monkeypatch.setattr(tracing, "_is_watched", lambda _: True)  # no repeat is taken for another
    assert call(count) == repeated


def test_what_is_left_alive_is_what_the_events_say() -> None:
    memory = Memory.of("cuda")
    tensors = [torch.empty(size, device="meta") for size in (1000, 3 * MIB, 5)]
    for tensor in tensors:
        memory.add(tensor)
    memory.worked(7 * MIB)
    del tensors[1], tensor
    allocator = CachingAllocator()
    for piece, nbytes in memory.events or ():
        allocator.free(piece) if nbytes == FREED else allocator.allocate(piece, nbytes)
    assert allocator.allocated == memory.alive == sum(memory.sizes.values()) == 4096 + 512


def test_a_call_of_a_driven_network_needs_the_same() -> None:
    with torch.device("meta"):
        network = Blocks(2).half()

    def run() -> None:
        network(torch.empty(1, 4096, 1024, dtype=torch.float16, device="meta"))

    (driven,) = drive(run, {"network": network}, entries=(), device="cuda").calls
    assert (driven.call.peak, driven.call.spare) == (call(2).peak, call(2).spare)


def test_pieces_of_memory_have_a_number_each() -> None:
    """The third begins after the first is gone, and while the second is there."""
    events = [(4, 10), (5, 20), (4, FREED), (7, 30), (5, FREED)]
    assert closed(events) == ((0, 10), (1, 20), (0, FREED), (2, 30), (1, FREED), (2, FREED))
