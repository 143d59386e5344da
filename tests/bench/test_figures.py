"""The arithmetic of the table, and the places of labels: pure functions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench import samples

from lowtide.bench.figures import ratio, same_pictures, summaries, undominated
from lowtide.bench.labels import Box, placed
from lowtide.bench.runs import Job, in_turn
from lowtide.bench.techniques import TECHNIQUES

HALF = Job("half", "lowtide")


def test_the_median_latency_and_the_largest_peak_of_all_rounds():
    runs = [samples.run("half", samples.reading(seconds, peak)) for seconds, peak in ((3.0, 5), (1.0, 7), (2.0, 6))]
    summary = summaries(runs)[HALF]
    assert (summary.latency, summary.peak, summary.failure) == (2.0, 7, None)
    assert summary.latencies() == [3.0, 1.0, 2.0]


def test_a_failed_run_leaves_the_readings_before_it():
    summary = summaries([samples.run("half", samples.reading(3.0)), samples.run("half", "lost", 2)])[HALF]
    assert (summary.latency, summary.failure) == (3.0, "lost")
    summary = summaries([samples.run("half", "lost")])[HALF]
    assert (summary.latency, summary.peak, summary.failure) == (None, None, "lost")


def test_a_gpus_memory_goes_before_the_hosts():
    assert samples.reading(peak=5).peak == 5
    assert samples.reading(peak=5, device_allocated=3).peak == 3
    assert summaries([samples.run("half", samples.reading(peak=None))])[HALF].peak is None


@pytest.mark.parametrize(("one", "other", "found"), [(3, 2, 1.5), (None, 2, None), (3, None, None), (3, 0, None)])
def test_ratios_of_what_is_there(one, other, found):
    assert ratio(one, other) == found


def test_points_that_nothing_beats():
    points = [(4.0, 1.0), (1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (2.0, 2.5), (5.0, 1.0)]
    assert undominated(points) == [1, 2, 0]
    assert undominated([]) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_every_other_point_is_beaten_by_one_of_the_chosen(points):
    chosen = undominated(points)
    for one, other in itertools.pairwise(chosen):
        assert points[one][0] < points[other][0]
        assert points[one][1] > points[other][1]
    for x, y in points:
        assert any(points[index][0] <= x and points[index][1] <= y for index in chosen)


def test_equal_pictures_are_those_of_all_runs_of_one_library():
    found = summaries(
        [
            samples.run("half", samples.reading(checksum="a")),
            samples.run("vae-slicing", samples.reading(checksum="a")),
            samples.run("attention", samples.reading(checksum="a")),
            samples.run("attention", samples.reading(checksum="b"), 2),
            samples.run("traced", "lost"),
            samples.run("half", samples.reading(checksum="a"), library="diffusers"),
        ]
    )
    assert same_pictures(found, HALF) == [Job("vae-slicing", "lowtide")]
    assert same_pictures({}, HALF) == []


def test_runs_take_turns_and_a_failed_one_is_not_tried_again():
    jobs = samples.options(("half", "traced", "vae-exact"), peer="diffusers").jobs()
    assert [(job.technique, job.library) for job in jobs] == [
        ("half", "lowtide"),
        ("half", "diffusers"),
        ("traced", "lowtide"),
        ("traced", "diffusers"),
        ("vae-exact", "lowtide"),
    ]
    events = []

    def run_one(job):
        events.append(job)
        return (None, "lost") if job == Job("traced", "diffusers") else (samples.reading(), None)

    runs = list(in_turn(jobs, 2, run_one, lambda: events.append("end")))
    again = [job for job in jobs if job != Job("traced", "diffusers")]
    assert events == [*jobs, "end", *again, "end"]
    assert [(run.round, run.job) for run in runs] == [(1, job) for job in jobs] + [(2, job) for job in again]


def test_only_the_original_is_in_float32():
    options = samples.options()
    assert options.spec(Job("original", "lowtide"), "x").dtype == "float32"
    others = [name for name in TECHNIQUES if name != "original"]
    assert {options.spec(Job(name, "lowtide"), "x").dtype for name in others} == {"bfloat16"}


def test_labels_lie_on_the_page_and_on_no_other():
    page = Box(0, 0, 500, 400)
    anchors = [(100 + 4 * i, 200 + 3 * (i % 3)) for i in range(10)] + [(499, 399), (1, 1)]
    boxes = placed(anchors, [(60, 12)] * len(anchors), page)
    assert all(box.shared(page) == pytest.approx(box.area) for box in boxes)
    assert all(one.shared(other) == 0 for one, other in itertools.combinations(boxes, 2))
    nearest = [box.nearest(*anchor) for box, anchor in zip(boxes, anchors, strict=True)]
    assert all(abs(x - a) + abs(y - b) < 120 for (x, y), (a, b) in zip(nearest, anchors, strict=True))
