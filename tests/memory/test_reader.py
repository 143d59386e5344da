"""The thread that reads ahead: how far it is, and what an interrupt, or the end of the process, leaves of it."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.memory.cases import all_at_rest
from tests.memory.ruled import Ruled, expected, made

from lowtide.memory.reader import Reader, Reading

CASE = Ruled("leaves ahead")


class Held:
    """As much of a load as a reader knows."""

    reading: Reading


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lowtide-reader")}


def come_to(count: int, beside: set[threading.Thread]) -> bool:
    """Whether there are soon so many readers, those of other tests not counted: one that is to end takes a moment."""
    gc.collect()
    until = time.monotonic() + 5
    while len(readers() - beside) != count and time.monotonic() < until:
        time.sleep(0.01)
    return len(readers() - beside) == count


def interrupted_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next thread starts, and then Ctrl-C comes into its start."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)


def test_an_interrupt_in_the_start_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = readers()
    module, attachment = made(CASE)
    interrupted_start(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        module.run()
    assert torch.equal(module.run(), expected(CASE))
    assert all_at_rest(attachment)
    assert come_to(1, before), "the one that was interrupted has ended, and there is another"
    del module, attachment
    assert come_to(0, before)


SCRIPT = """
import threading, time, torch
from torch import nn
from lowtide.memory import apply_residency

module, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False), torch.ones(1, 8)
expected = module(x)
apply_residency(module, rest="disk", level="leaf", device="cpu")
start = threading.Thread.start

def interrupted(thread):
    threading.Thread.start = start
    start(thread)
    raise KeyboardInterrupt

threading.Thread.start = interrupted
try:
    module(x)
except KeyboardInterrupt:
    time.sleep(0.1)
assert torch.equal(module(x), expected)
threading._shutdown()  # as at the end of a process
print("ended")
"""


def test_a_process_ends_after_such_an_interrupt(warm: Any, tmp_path: Path) -> None:
    assert warm.run(SCRIPT, tmp_path, 20).check().endswith("ended\n")


def test_what_is_called_off_is_not_begun() -> None:
    reader, begun, goes_on = Reader(), threading.Event(), threading.Event()
    done: list[Any] = []

    def read(load: Any) -> None:
        begun.set()
        goes_on.wait(10)
        done.append(load)

    loads: list[Any] = [Held() for _ in range(3)]
    for load in loads:
        reader.ask(load, read)
    assert begun.wait(10)
    for _ in range(2):  # an interrupt may have come into the first time
        loads[1].reading.call_off()
    goes_on.set()
    loads[0].reading.call_off()
    for _ in range(2):
        loads[2].reading.wait()
    assert done == [loads[0], loads[2]]
    assert [load.reading.is_called_off for load in loads] == [False, True, False]


def test_an_error_is_raised_where_it_is_waited_for() -> None:
    reader, load = Reader(), Held()

    def read(_: Any) -> None:
        raise OSError("no disk")

    reader.ask(load, read)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(OSError, match="no disk"):
            load.reading.wait()
    load.reading.call_off()
