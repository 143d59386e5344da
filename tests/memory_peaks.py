"""Peaks of memory: of tensors on the CPU, from the profiler's events (exact), and of the whole process."""

from contextlib import contextmanager
from types import SimpleNamespace

import psutil
from torch.profiler import ProfilerActivity, profile

from lowtide.measuring.peaks import PeakSource


@contextmanager
def peak_of():
    """What the block adds to this process's resident memory at its peak, in bytes: `grown`, once it has ended."""
    peak, source = SimpleNamespace(grown=None), PeakSource(None)
    source.start()
    before = psutil.Process().memory_info().rss
    try:
        yield peak
    finally:
        peak.grown = source.take().rss - before
        source.stop()


def peak_bytes(call):
    """Bytes of tensors that `call()` has alive at once, at most, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
