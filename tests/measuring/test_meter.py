"""The meter sees what a stage used, no more and no less, also when stages nest."""

import linecache
import mmap
import os
import platform
import subprocess
import sys
import threading
import types
from contextlib import contextmanager, suppress

import pytest
import torch
from rich.console import Console
from tests.forked import in_child
from tests.lines import at_lines_of

from lowtide.machine.accelerators import accelerator
from lowtide.measuring import meter, peaks
from lowtide.memory import Meter
from lowtide.stages import Stages

MIB = 2**20
BLOCK = 48 * MIB
SLACK = 8 * MIB

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@contextmanager
def memory(size=BLOCK):
    """Hold `size` bytes of anonymous memory, straight from the system: malloc might reuse what was freed before."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:: mmap.PAGESIZE] = b"x" * (size // mmap.PAGESIZE)
        yield


def touch(size=BLOCK):
    """Use `size` bytes of anonymous memory for a moment."""
    with memory(size):
        pass


def measured(work, **options):
    m = Meter(**options)
    with Stages([m]).stage("before"):
        pass
    with Stages([m]).stage("work"):
        work()
    before, reading = m.report()
    return reading, before.peak_rss


@linux
def test_the_peak_of_freed_memory_is_exact():
    reading, before = measured(touch, interval=None)
    assert BLOCK - MIB <= reading.peak_rss - before <= BLOCK + SLACK


@linux
def test_without_the_reset_the_peak_would_be_that_of_an_earlier_stage(monkeypatch):
    def quiet_after_loud():
        touch()
        return measured(lambda: None, interval=None)

    reading, before = quiet_after_loud()
    assert reading.peak_rss - before < SLACK
    monkeypatch.setattr(peaks, "_CLEAR_REFS", peaks.Path("/dev/null"))
    m = Meter(interval=None)
    now = peaks._in_use().rss
    with Stages([m]).stage("unreset"):
        pass
    touch()
    with Stages([m]).stage("unreset"):
        pass
    assert m.report()[1].peak_rss - now > BLOCK - SLACK


@linux
def test_anonymous_memory_is_told_from_files(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"x" * BLOCK)

    def read_mapping(stage):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            assert sum(view[:: mmap.PAGESIZE]) > 0
            stage.advance()

    m = Meter(interval=None)
    stages = Stages([m])
    with stages.stage("before"):
        pass
    with stages.stage("map", steps=1) as stage:
        read_mapping(stage)
    with stages.stage("allocate", steps=1) as stage, memory():
        stage.advance()
    before, mapped, allocated = m.report()
    assert mapped.peak_file - before.peak_file > BLOCK - SLACK
    assert mapped.peak_anonymous - before.peak_anonymous < SLACK
    assert allocated.peak_anonymous - before.peak_anonymous > BLOCK - SLACK
    assert allocated.peak_file - before.peak_file < SLACK


@linux
def test_the_thread_sees_memory_between_the_steps():
    def slow_touch():
        with memory():
            threading.Event().wait(0.1)

    with_thread, _ = measured(slow_touch, interval=0.005)
    without_thread, _ = measured(slow_touch, interval=None)
    assert with_thread.peak_anonymous - without_thread.peak_anonymous > BLOCK - SLACK


@linux
def test_a_nested_stage_hides_nothing_from_the_one_around_it():
    m = Meter(interval=None)
    stages = Stages([m])
    with stages.stage("call"):
        touch()
        with stages.stage("quiet"):
            pass
        with stages.stage("loud"):
            touch(2 * BLOCK)
    call, quiet, loud = m.report()
    assert [r.depth for r in (call, quiet, loud)] == [0, 1, 1]
    assert call.peak_rss == loud.peak_rss
    assert loud.peak_rss - quiet.peak_rss > 2 * BLOCK - SLACK
    assert call.seconds >= quiet.seconds + loud.seconds


@linux
def test_the_part_of_a_stage_before_an_inner_one_counts():
    m = Meter(interval=None)
    stages = Stages([m])
    with stages.stage("call"):
        touch()
        with stages.stage("quiet"):
            pass
    call, quiet = m.report()
    assert call.peak_rss - quiet.peak_rss > BLOCK - SLACK


def test_an_interrupted_stage_is_reported_and_its_thread_ends():
    m = Meter(interval=0.001)
    seen_inside = []

    def interrupted():
        seen_inside.extend(thread.name for thread in threading.enumerate())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Stages([m]).stage("denoise"):
        interrupted()
    assert "lowtide-meter" in seen_inside
    assert [reading.name for reading in m.report()] == ["denoise"]
    assert "lowtide-meter" not in [thread.name for thread in threading.enumerate()]


def test_a_running_stage_is_not_reported_yet():
    m = Meter(interval=None)
    with Stages([m]).stage("denoise"):
        assert m.report() == []


def test_without_procfs_resident_memory_is_sampled_and_its_parts_unknown(monkeypatch):
    monkeypatch.setattr(peaks.sys, "platform", "darwin")
    m = Meter(interval=None)
    with Stages([m]).stage("denoise"):
        pass
    (reading,) = m.report()
    assert not m.exact_rss
    assert reading.peak_rss > MIB
    assert reading.peak_anonymous is None
    assert reading.peak_file is None
    assert "sampled (resident memory)" in shown(m.table())


class FakeKind:
    """Enough of an accelerator for the meter: two devices, and a clock that runs in milliseconds."""

    def __init__(self, monkeypatch):
        self.peak = [0, 0]
        self.clock = 0.0
        for module in (peaks, meter):
            monkeypatch.setattr(module, "accelerators_in_use", lambda: [(0, self), (1, self)])

    def peaks(self, device):
        return self.peak[device], 2 * self.peak[device]

    def begin_peaks(self, device):
        self.peak[device] = 0

    def timed_event(self, device):
        return FakeEvent(self.clock)


class FakeEvent:
    def __init__(self, at):
        self.at = at

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_peaks_on_devices_and_their_own_time(monkeypatch):
    cuda = FakeKind(monkeypatch)
    m = Meter(interval=None)
    stages = Stages([m])
    with stages.stage("denoise"):
        cuda.peak = [5 * MIB, MIB]
        cuda.clock += 1500
    with stages.stage("decode"):
        cuda.peak = [2 * MIB, 0]
    denoise, decode = m.report()
    assert (denoise.peak_device, denoise.peak_device_reserved, denoise.seconds) == (6 * MIB, 12 * MIB, 1.5)
    assert (decode.peak_device, decode.seconds) == (2 * MIB, 0.0)
    assert "6.3 MB" in shown(m.table())


def test_while_another_thread_imports_torch_there_is_no_device_yet(monkeypatch):
    unfinished = types.ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", unfinished)
    assert peaks.device_allocated() is None
    unfinished.cuda = types.ModuleType("torch.cuda")
    assert peaks.device_allocated() is None


def test_peaks_on_a_device(device):
    kept = torch.zeros(1, device=device)
    m = Meter(interval=None)
    before = accelerator(device).allocated(device)
    with Stages([m]).stage("denoise"):
        torch.zeros(BLOCK, dtype=torch.uint8, device=device)
    with Stages([m]).stage("quiet"):
        pass
    denoise, quiet = m.report()
    assert denoise.peak_device - before == BLOCK
    assert quiet.peak_device == before >= kept.nbytes


def shown(table):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


def test_the_table_joins_stages_of_one_name_and_adds_them_up():
    m = Meter(interval=None)
    stages = Stages([m])
    for _ in range(3):
        with stages.stage("denoise"), stages.stage("unet"):
            pass
    with stages.stage("decode"):
        pass
    lines = [line.strip() for line in shown(m.table()).splitlines()]
    first_words = [line.split("  ")[0] for line in lines if line and line[0].isalpha()]
    assert first_words[:5] == ["stage", "denoise ×3", "unet ×3", "decode", "all"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_forked_child_stages_of_other_threads_are_over():
    m, begun, goes_on = Meter(None), threading.Event(), threading.Event()
    stages = Stages([m])

    def run():
        with stages.stage("denoise"):
            begun.set()
            goes_on.wait(60)

    def depths():
        with stages.stage("decode"):
            pass
        return torch.tensor([[reading.depth, reading.shared] for reading in m.report()])

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(60)
    try:
        assert in_child(depths).tolist() == [[0, 0]]
    finally:
        goes_on.set()
        thread.join()
    assert [reading.name for reading in m.report()] == ["denoise"]


def test_a_meter_that_nobody_keeps_samples_no_more():
    """As that of a call whose end an interrupt cut short."""
    m = Meter(0.001)
    m.stage_started("denoise", None)
    thread = m._source._thread
    assert thread.is_alive()
    del m
    thread.join(10)
    assert not thread.is_alive()
    alone = Meter(None)
    with Stages([alone]).stage("decode"):
        pass
    assert not alone.report()[0].shared


def ends_when_cut_at(line):
    """Whether a source whose start or end an interrupt cuts short there can be ended."""
    source = peaks.PeakSource(0.001)

    def interrupt(now):
        if now == line:
            raise KeyboardInterrupt

    def run():
        for call in (source.start, source.stop):
            with suppress(KeyboardInterrupt, RuntimeError):  # "release unlocked lock": Python's own, and no wait
                at_lines_of(threading.__file__, call, interrupt)
        with suppress(RuntimeError):
            source.stop()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


def test_an_interrupt_in_the_code_of_threads_blocks_nobody():
    source, lines = peaks.PeakSource(0.001), {}
    for call in (source.start, source.stop):
        at_lines_of(threading.__file__, call, lines.setdefault)
    sources = {line: linecache.getline(threading.__file__, line).strip() for line in lines}
    possible = [line for line, text in sources.items() if text != "try:" and "_lock:" not in text]
    assert [line for line in possible if not ends_when_cut_at(line)] == []


CHURN = """
import sys
from lowtide.memory import steady_malloc
from lowtide.measuring.peaks import _in_use
if sys.argv[1] == "steady":
    assert steady_malloc()
bytearray(30 << 20)  # by default, glibc's threshold follows the largest block that was freed
blocks = [bytearray(2 << 20) for _ in range(32)]
full = _in_use().rss
del blocks[:-1]
print(full - _in_use().rss)
"""


def given_back(mode):
    done = subprocess.run([sys.executable, "-c", CHURN, mode], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets an option of glibc")
def test_steady_malloc_gives_freed_blocks_back_where_the_default_does_not():
    assert given_back("steady") > 60 * MIB
    assert given_back("default") < 60 * MIB
