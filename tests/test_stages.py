"""Stage brackets and what their observers hear."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from lowtide.stages import Stages


class Listener:
    """Writes down what it hears; two of them compare equal, as dataclass observers might."""

    def __init__(self, fail_at=None):
        self.heard = []
        self.fail_at = fail_at

    def __eq__(self, other):
        return isinstance(other, Listener)

    __hash__ = None

    def _hear(self, *event):
        self.heard.append(event)
        if event[0] == self.fail_at:
            raise RuntimeError("the observer broke")

    def stage_started(self, name, steps):
        self._hear("started", name, steps)

    def step_done(self, name, step):
        self._hear("step", name, step)

    def stage_finished(self, name):
        self._hear("finished", name)


def test_a_stage_tells_its_start_steps_and_end():
    listener = Listener()
    stages = Stages([listener])
    with stages.stage("denoise", steps=2) as stage:
        stage.advance()
        stage.advance()
    assert stage.step == 2
    assert listener.heard == [
        ("started", "denoise", 2),
        ("step", "denoise", 1),
        ("step", "denoise", 2),
        ("finished", "denoise"),
    ]


def test_stages_nest():
    listener = Listener()
    stages = Stages([listener])
    with stages.stage("call"), stages.stage("decode", steps=1) as decode:
        decode.advance()
    assert [event[:2] for event in listener.heard] == [
        ("started", "call"),
        ("started", "decode"),
        ("step", "decode"),
        ("finished", "decode"),
        ("finished", "call"),
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_end_is_told_after_an_exception(error):
    first, second = Listener(), Listener()
    with pytest.raises(error), Stages([first, second]).stage("denoise"):
        raise error
    assert first.heard[-1] == second.heard[-1] == ("finished", "denoise")


def test_the_end_reaches_all_observers_though_one_of_them_breaks():
    first, second = Listener(), Listener(fail_at="finished")
    with pytest.raises(RuntimeError), Stages([first, second]).stage("denoise"):
        pass
    assert first.heard[-1] == ("finished", "denoise")


def test_an_observer_that_fails_to_start_closes_those_before_it_only():
    first, second, third = Listener(), Listener(fail_at="started"), Listener()
    with pytest.raises(RuntimeError), Stages([first, second, third]).stage("denoise"):
        pytest.fail("the stage must not run")
    assert first.heard == [("started", "denoise", None), ("finished", "denoise")]
    assert second.heard == [("started", "denoise", None)]
    assert third.heard == []


def test_observed_adds_for_a_while_and_removes_the_very_object():
    kept, passing = Listener(), Listener()
    stages = Stages([kept])
    with stages.observed(passing):
        assert stages.watching == (kept, passing)
    with pytest.raises(ValueError, match="stop"), stages.observed(passing, passing):
        raise ValueError("stop")
    assert stages.watching == (kept,)
    assert stages.observers == [kept]


def test_what_is_observed_for_a_while_is_so_in_its_own_thread():
    everywhere, here = Listener(), Listener()
    stages = Stages([everywhere])

    def elsewhere():
        with stages.stage("decode"):
            pass

    with stages.observed(here), ThreadPoolExecutor(1) as threads:
        threads.submit(elsewhere).result()
    assert everywhere.heard == [("started", "decode", None), ("finished", "decode")]
    assert here.heard == []


def test_an_observer_removed_inside_a_stage_still_hears_its_end():
    listener = Listener()
    stages = Stages([listener])
    with stages.stage("denoise"):
        stages.observers.clear()
    assert listener.heard[-1] == ("finished", "denoise")
