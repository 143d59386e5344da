"""Two meters at once: both see the peak of the process, and say that it was shared."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from tests.forked import Parked
from tests.lines import places
from tests.measuring.test_meter import BLOCK, MIB, SLACK, FakeKind, shown, touch

from lowtide.measuring import peaks
from lowtide.memory import Meter
from lowtide.stages import Stages

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_a_meter_that_resets_takes_no_peak_from_another():
    """Threads take turns: memory is used at moments between the resets of the other meter."""
    turn = Barrier(2, timeout=20)
    before = {}

    def long_stage(m):
        with Stages([m]).stage("long"):
            turn.wait()  # 1: the long stage has begun
            before["long"] = peaks._in_use().rss
            touch(2 * BLOCK)
            turn.wait()  # 2: the peak has been
            turn.wait()  # 3: the short stages have ended

    def short_stages(m):
        stages = Stages([m])
        turn.wait()  # 1
        with stages.stage("loud"):
            turn.wait()  # 2
            before["loud"] = peaks._in_use().rss
            touch()
        before["quiet"] = peaks._in_use().rss
        with stages.stage("quiet"):
            pass
        turn.wait()  # 3

    long, short = Meter(interval=None), Meter(interval=None)
    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(long_stage, long), pool.submit(short_stages, short)):
            done.result()
    (reading,) = long.report()
    loud, quiet = short.report()
    assert reading.peak_rss - before["long"] >= 2 * BLOCK - SLACK
    assert loud.peak_rss - before["loud"] >= BLOCK - SLACK
    assert quiet.peak_rss - before["quiet"] <= SLACK
    assert reading.shared
    assert loud.shared
    assert quiet.shared


@linux
def test_no_peak_is_lost_while_another_meter_begins_the_marks_anew():
    """The thread of the other meter stops at each of its lines while memory is used for a moment."""

    def short_stage():
        with Stages([Meter(interval=None)]).stage("short"):
            pass

    stops = places(short_stage, ("measuring/peaks.py",))
    assert stops
    for place in stops:
        m = Meter(interval=None)
        with Stages([m]).stage("long"), Parked(short_stage, place) as parked:
            before = peaks._in_use().rss
            touch(2 * SLACK)
        assert parked.has_come, str(place)
        assert m.report()[0].peak_rss - before >= SLACK, str(place)


def test_peaks_on_devices_are_handed_on_too(monkeypatch):
    cuda = FakeKind(monkeypatch)
    outer, inner = Meter(interval=None), Meter(interval=None)
    with Stages([outer]).stage("long"):
        cuda.peak = [5 * MIB, MIB]
        with Stages([inner]).stage("short"):
            cuda.peak = [2 * MIB, 0]
    assert outer.report()[0].peak_device == 6 * MIB
    assert inner.report()[0].peak_device == 2 * MIB


def test_a_meter_alone_shares_nothing_and_the_caption_says_where_one_does():
    alone, other = Meter(interval=None), Meter(interval=None)
    with Stages([alone]).stage("before"):
        pass
    assert "Another meter" not in shown(alone.table())
    with Stages([alone]).stage("together"), Stages([other]).stage("short"):
        pass
    with Stages([alone]).stage("after"):
        pass
    assert [reading.shared for reading in alone.report()] == [False, True, False]
    assert "Another meter was open at the same time" in " ".join(shown(alone.table()).split())
