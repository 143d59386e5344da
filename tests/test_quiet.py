"""Warnings are ignored in the thread that asked for it, and the process's filters stay."""

import threading
import warnings

import pytest

from lowtide.quiet import quiet


def warn(category=UserWarning):
    warnings.warn("heard", category, stacklevel=2)


def test_warnings_of_a_category_are_ignored_while_it_lasts():
    with quiet(), quiet(FutureWarning):
        warn()
    with quiet(FutureWarning):
        warn(FutureWarning)
        with pytest.raises(UserWarning, match="heard"):
            warn()
    with pytest.raises(UserWarning, match="heard"):
        warn()


def test_the_filters_of_others_come_before_and_after():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet():
            warn()
        warnings.simplefilter("error")
        with quiet():
            warn()
        with pytest.raises(UserWarning, match="heard"):
            warn()


def test_another_thread_hears_its_own_and_no_filter_is_left_behind():
    """The first to begin is the first to end."""
    entered, may_end, heard = threading.Event(), threading.Event(), []

    def other():
        with quiet():
            entered.set()
            may_end.wait()
            warn()

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        entered.wait()
        filters = list(warnings.filters)
    with pytest.raises(UserWarning) as error:
        warn()
    heard.append(str(error.value))
    may_end.set()
    thread.join()
    assert heard == ["heard"]
    assert warnings.filters == filters
    with pytest.raises(UserWarning, match="heard"):
        warn()
