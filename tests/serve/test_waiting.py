"""The queue: fair to owners, and bounded; and who may ask."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from lowtide.serve.job import Job, State
from lowtide.serve.job_store import JobStore
from lowtide.serve.keys import ANYONE, keys_in, owner_of
from lowtide.serve.problems import ProblemError
from lowtide.serve.waiting import Waiting

KEY, OTHER = "a key that is long enough", "another key that is long enough"


def job(name, owner="anna", seconds=1.0, key=None):
    return Job(name, owner, "seascapes", {}, [1], 0.0, {"seconds": seconds}, idempotency_key=key)


def order(waiting):
    taken: list[str] = []
    while (job := waiting.next()) is not None:
        waiting.take(job)
        taken.append(job.id)
    return taken


def test_who_asks_for_much_waits_for_others():
    waiting = Waiting(10)
    for each in (job("a1"), job("a2"), job("a3"), job("b1", "bert"), job("b2", "bert")):
        waiting.add(each)
    assert waiting.seconds == 5
    assert order(waiting) == ["a1", "b1", "a2", "b2", "a3"]


def test_long_jobs_count_for_more():
    waiting = Waiting(10)
    for each in (job("a1", seconds=3), job("a2"), job("b1", "bert"), job("b2", "bert"), job("b3", "bert")):
        waiting.add(each)
    assert order(waiting) == ["a1", "b1", "b2", "b3", "a2"]


def test_who_comes_new_does_not_go_before_all_others_for_long():
    waiting = Waiting(10)
    for place in range(5):
        waiting.add(job(f"a{place}"))
        taken = waiting.next()
        assert taken is not None
        waiting.take(taken)
    waiting.add(job("a5"))
    for place in range(3):
        waiting.add(job(f"b{place}", "bert"))
    assert order(waiting) == ["a5", "b0", "b1", "b2"]


def test_a_job_that_was_begun_is_first():
    waiting = Waiting(2)
    waiting.add(job("a1"))
    begun = job("a2")
    begun.attempts = 1
    waiting.add(begun, first=True)
    assert waiting.is_full
    assert waiting.remove("none") is None
    assert order(waiting) == ["a2", "a1"]


def like(name, call, seeds=(1,), **settings):
    return Job(name, "anna", "seascapes", call, list(seeds), 0.0, **{"together": 4, **settings})


def test_jobs_are_alike_that_differ_in_texts_and_seeds():
    waiting, red = Waiting(10), {"prompt": "red", "width": 64}
    alike = [like("a", {"prompt": "blue", "width": 64}, [2, 3]), like("b", red), like("c", red)]
    others = [
        like("wide", red | {"width": 72}),
        like("negative", red | {"negative_prompt": "grey"}),
        like("from a picture", red, pictures={"image": ["a.png"]}),
        like("alone", red, together=1),
        Job("of another model", "anna", "clips", red, [1], 0.0, together=4),
    ]
    for each in [*others, *alike]:
        waiting.add(each)
    job = like("first", red)
    assert waiting.like(job) == alike[:2], "four pictures, with its own"
    assert waiting.like(job, but={"a"}) == alike[1:]
    assert waiting.like(like("enough", red, range(4))) == []
    assert waiting.like(others[2]) == waiting.like(others[3]) == []


def test_what_is_made_along_is_not_begun_meanwhile():
    waiting = Waiting(10)
    waiting.add(job("a"))
    waiting.add(job("b"))
    assert waiting.next(but={"a"}) is waiting.remove("b")
    assert waiting.next(but={"a"}) is None


def test_jobs_are_kept(tmp_path):
    store = JobStore(tmp_path)
    first = store.add(job("1", key="k"))
    assert store.add(job("2", key="k")) == first
    assert store.add(job("3", "bert", key="k")).id == "3"
    assert store.add(job("4")).id == "4"
    first.state, first.files = State.DONE, ["0.png"]
    store.keep(first)
    store.close()
    store = JobStore(tmp_path)
    assert store.get("1") == first
    assert store.get("none") is None
    assert {each.id for each in store.jobs(State.QUEUED)} == {"3", "4"}
    assert [each.id for each in store.jobs(owner="bert")] == ["3"]
    store.remove("1")
    assert store.get("1") is None


def test_a_disk_that_is_full_is_told(tmp_path):
    store = JobStore(tmp_path)
    first = store.add(job("1"))
    store._jobs.execute("PRAGMA max_page_count=1")
    with pytest.raises(OSError, match="full"):
        store.add(Job("2", "anna", "seascapes", {"prompt": "x" * 10**6}, [1], 0.0))
    assert store.get("2") is None
    assert store.get("1") == first


def test_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{KEY}\n{OTHER}\n")
    keys = keys_in(file)
    assert owner_of(None, ()) == ANYONE
    owners = {owner_of(f"Bearer {key}", keys) for key in keys}
    assert len(owners) == 2
    for wrong in (None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer x", f"Bearer {KEY}x"):
        with pytest.raises(ProblemError):
            owner_of(wrong, keys)
    for content in ("", "# none\n", "short\n"):
        file.write_text(content)
        with pytest.raises(ValueError, match="key"):
            keys_in(file)
