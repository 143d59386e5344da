"""How long jobs are kept, and which models are in a folder."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("fastapi")

from lowtide.serve.job import Job, State
from lowtide.serve.job_store import JobStore
from lowtide.serve.model_folders import models_in
from lowtide.serve.retention import DAY, LOST, Retention

NOW = 100 * DAY


@pytest.fixture
def store(tmp_path):
    """Jobs that ended 1, 2 and 3 days ago with 100 bytes each, and an old one in every other state."""
    store = JobStore(tmp_path)
    for days in (1, 2, 3):
        add(store, f"done{days}", State.DONE, NOW - days * DAY)
    add(store, "failed9", State.FAILED, NOW - 9 * DAY)
    add(store, "queued", State.QUEUED, None)
    add(store, "running", State.RUNNING, None)
    yield store
    store.close()


def add(store, name, state, ended):
    store.add(Job(name, "anna", "seascapes", {}, [1], NOW - 50 * DAY, state=state, ended=ended))
    store.results(name).mkdir(parents=True)
    (store.results(name) / "0.png").write_bytes(b"x" * 100)


def kept(store):
    jobs = {job.id for job in store.jobs()}
    assert jobs == {folder.name for folder in store.results("").iterdir()}, "jobs and their files go together"
    return jobs - {"queued", "running"} if {"queued", "running"} <= jobs else None


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), {"done1", "done2", "done3", "failed9"}),
        (Retention(seconds=2.5 * DAY), {"done1", "done2"}),
        (Retention(nbytes=250), {"done1", "done2"}),
        (Retention(nbytes=300), {"done1", "done2", "done3"}),
        (Retention(seconds=1.5 * DAY, nbytes=250), {"done1"}),
        (Retention(seconds=0.0), set()),
        (Retention(nbytes=0), set()),
    ],
)
def test_what_is_old_or_too_much_goes_and_what_waits_or_runs_stays(store, retention, left):
    assert retention.sweep(store, NOW) == (4 - len(left), 0)
    assert kept(store) == left
    assert retention.sweep(store, NOW) == (0, 0)


def test_what_has_just_ended_can_be_fetched(store):
    add(store, "new", State.DONE, NOW - 10)
    assert Retention(seconds=0.0, nbytes=0).sweep(store, NOW) == (4, 0)
    assert kept(store) == {"new"}


def test_folders_without_a_job_go_once_they_are_old(store):
    for name, age in (("lost", LOST + 60), ("new", 60)):
        folder = store.results(name)
        folder.mkdir()
        os.utime(folder, (NOW - age, NOW - age))
    assert Retention().sweep(store, NOW) == (0, 1)
    assert not store.results("lost").exists()
    assert store.results("new").exists()


def test_jobs_are_counted(store):
    assert store.counts() == {"queued": 1, "running": 1, "done": 3, "failed": 1, "cancelled": 0}


# ---- models in a folder


def a_model(folder):
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")


def test_every_folder_with_a_model_is_one(tmp_path):
    for name in ("sd15", "Wan2.1-T2V"):
        a_model(tmp_path / name)
    (tmp_path / "no model").mkdir()
    (tmp_path / "sd15" / "link").symlink_to(tmp_path / "Wan2.1-T2V")
    assert models_in(tmp_path) == {name: str(tmp_path / name) for name in ("Wan2.1-T2V", "sd15")}


@pytest.mark.parametrize("name", ["a model", "modèle", ".hidden", "-option", "x" * 101, "a\nb"])
def test_odd_names_are_refused(tmp_path, name):
    a_model(tmp_path / name)
    with pytest.raises(ValueError, match="name"):
        models_in(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    models = tmp_path / "models"
    a_model(tmp_path / "elsewhere")
    models.mkdir()
    (models / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link out of"):
        models_in(models)
    (models / "linked").unlink()
    a_model(models / "own")
    (models / "own" / "weights").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="link out of"):
        models_in(models)


def test_a_folder_without_models_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="folder"):
            models_in(folder)
