"""The heap of this process: its settings have one owner, which knows all that ask for something."""

import gc
import threading
from types import SimpleNamespace

import pytest

from lowtide.fitting.observers import KEPT, KEPT_BESIDE_STREAMS, Heap
from lowtide.machine import heap


def test_the_heap_can_be_trimmed_or_it_is_told():
    assert isinstance(heap.trim_heap(), bool)


@pytest.fixture
def settings(monkeypatch):
    """What glibc would be told, in order."""
    told = []
    monkeypatch.setattr(heap, "_set_thresholds", lambda thresholds: told.append(thresholds) or True)
    heap.steady_malloc()
    yield told
    heap.steady_malloc()


def fast():
    """The observer of a run whose plan keeps freed memory."""
    return observer(rule=None)


def observer(rule):
    stage, part = SimpleNamespace(frugal=False, component="unet"), SimpleNamespace(rule=rule)
    return Heap(lambda: SimpleNamespace(stage=lambda name: stage, components={"unet": part}))


def test_where_weights_come_and_go_the_heap_holds_smaller_blocks(settings):
    run = observer(rule="blocks")
    run.stage_started("denoise", 3)
    assert settings[-1] == heap.FRUGAL
    run.step_done("denoise", 1)
    assert settings[-1] == KEPT_BESIDE_STREAMS
    run.stage_finished("denoise")
    assert settings[-1] == heap.FRUGAL


def test_the_most_frugal_wish_of_those_present_holds(settings):
    malloc, first, second = heap.Malloc(), heap.Wish(), heap.Wish()
    malloc.wish(first, (8, 64))
    malloc.wish(second, (1, 100))
    assert settings[-1] == (1, 64)
    malloc.wish(second, (16, 100))
    assert settings[-1] == (8, 64)
    malloc.leave(first)
    assert settings[-1] == (16, 100)
    malloc.leave(second)
    assert settings[-1] == heap.FRUGAL


def test_a_run_that_begins_or_ends_does_not_change_what_another_needs(settings):
    first, second = fast(), fast()
    first.stage_started("denoise", 3)
    first.step_done("denoise", 1)
    assert settings[-1] == KEPT
    heap.steady_malloc()  # another pipeline's plan is put to work
    assert settings[-1] == KEPT
    second.stage_started("denoise", 3)
    assert settings[-1] == heap.FRUGAL
    first.step_done("denoise", 2)
    assert settings[-1] == heap.FRUGAL, "the second is in its first step"
    second.step_done("denoise", 1)
    assert settings[-1] == KEPT
    first.stage_finished("denoise")
    assert settings[-1] == KEPT, "the second still runs"
    second.stage_finished("denoise")
    assert settings[-1] == heap.FRUGAL


def test_what_was_set_for_the_process_comes_back(settings):
    heap.steady_malloc(4, 5)
    run = fast()
    run.stage_started("denoise", 1)
    run.stage_finished("denoise")
    assert settings[-1] == (4, 5)


@pytest.fixture
def collecting():
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


def test_no_garbage_is_looked_for_until_the_last_one_leaves(collecting):
    """Two plannings that overlap: the first to begin is the first to end."""
    entered, may_end = threading.Event(), threading.Event()

    def plan():
        with heap.without_collecting():
            entered.set()
            may_end.wait()

    other = threading.Thread(target=plan)
    with heap.without_collecting():
        other.start()
        entered.wait()
    try:
        assert not gc.isenabled(), "the other one still plans"
    finally:
        may_end.set()
        other.join()
    assert gc.isenabled()


def test_collecting_that_was_off_stays_off(collecting):
    gc.disable()
    with heap.without_collecting(), heap.without_collecting():
        pass
    assert not gc.isenabled()


def test_who_is_gone_wishes_for_nothing_and_stops_no_collecting(collecting):
    """As after an interrupt that came into the end of a stage, or of a plan."""
    malloc, wish = heap.Malloc(), heap.Wish()
    malloc.wish(wish, (1, 1))
    del wish
    assert not malloc._wishes
    heap._COLLECTOR.stop(heap.Call())
    assert not gc.isenabled()
    with heap.without_collecting():
        pass
    assert gc.isenabled()
