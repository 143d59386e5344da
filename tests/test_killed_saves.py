"""What a save that was killed leaves: completed by whoever loads next, from this folder alone, and never twice."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.forked import Parked, in_child
from tests.lines import places

from lowtide.configs import CheckpointError
from lowtide.hub import Source
from lowtide.killed_saves import MOVES, complete_saves, work_name
from lowtide.media.unfinished import is_running, writer

MACHINE = writer().partition("-")[0]


@pytest.fixture(scope="module")
def gone():
    """A process of this machine that has ended, as it names files."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return f"{MACHINE}-{ended.pid}"


def half_saved(target, process, *, moves=None, moved=()):
    """A checkpoint over which another was being saved; `moved` files have arrived already."""
    work = target / work_name(target, process)
    (work / "new" / "unet").mkdir(parents=True)
    (target / "unet").mkdir(exist_ok=True)
    for name in ("model_index.json", "unet/weights"):
        (target / name).write_text("old")
        (work / "new" / name).write_text("new")
    for name in moved:
        (work / "new" / name).rename(target / name)
    if moves is not False:
        usual = {"outgoing": ["model_index.json", "unet/weights"], "incoming": ["unet/weights", "model_index.json"]}
        (work / MOVES).write_text(json.dumps(moves or usual))
    return work


def content(target):
    return {(target / name).read_text() for name in ("model_index.json", "unet/weights")}


@pytest.mark.parametrize("moved", [(), ("unet/weights",), ("unet/weights", "model_index.json")])
@pytest.mark.parametrize("place", ["", "unet"])
def test_a_load_completes_it(gone, tmp_path, moved, place):
    work = half_saved(tmp_path, gone, moved=moved)
    assert Source(str(tmp_path / place)).fetch([]) == tmp_path / place
    assert content(tmp_path) == {"new"}
    assert not work.exists()
    complete_saves(tmp_path)
    assert content(tmp_path) == {"new"}


def test_before_its_moves_were_written_down_it_is_forgotten(gone, tmp_path):
    work = half_saved(tmp_path, gone, moves=False)
    complete_saves(tmp_path)
    assert content(tmp_path) == {"old"}
    assert not work.exists()


def test_that_of_a_running_process_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("lowtide.killed_saves._WAIT_SECONDS", 0.1)
    work = half_saved(tmp_path, writer())
    complete_saves(tmp_path)
    assert content(tmp_path) == {"old"}
    assert work.exists()


def test_that_of_another_machine_is_completed_when_it_must_be_over(tmp_path):
    work = half_saved(tmp_path, "0123abcd-7")
    complete_saves(tmp_path)
    assert content(tmp_path) == {"old"}
    long_ago = time.time() - 3600
    os.utime(work / MOVES, (long_ago, long_ago))
    complete_saves(tmp_path)
    assert content(tmp_path) == {"new"}


@pytest.mark.parametrize(
    "moves",
    [
        {"outgoing": [], "incoming": ["../outside"]},
        {"outgoing": ["/etc/passwd"], "incoming": []},
        {"outgoing": "all", "incoming": []},
        {"outgoing": [7], "incoming": []},
        {"incoming": []},
    ],
)
def test_a_list_that_no_save_wrote_is_refused(gone, tmp_path, moves):
    half_saved(tmp_path, gone, moves=moves)
    with pytest.raises(CheckpointError, match=r"moves\.json"):
        complete_saves(tmp_path)
    assert content(tmp_path) == {"old"}


def test_nothing_is_moved_through_a_link_that_leads_out(gone, tmp_path):
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    half_saved(target, gone)
    (target / "unet" / "weights").unlink()
    (target / "unet").rmdir()
    (target / "unet").symlink_to(outside)
    with pytest.raises(CheckpointError, match="behind a link"):
        complete_saves(target)
    assert os.listdir(outside) == []


def test_a_folder_that_cannot_be_written_to_says_so(gone, tmp_path, monkeypatch):
    half_saved(tmp_path, gone)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(OSError, match=r"was killed midway.*Permission denied"):
        complete_saves(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    "line", ["if path not in arrived", "(source / path).rename", "(destination / path).parent.mkdir"]
)
def test_two_processes_that_load_at_once(gone, tmp_path, line):
    """As several ranks do: one of them completes the save, and the others wait for it."""
    work = half_saved(tmp_path, gone)
    place = next(
        place for place in places(lambda: complete_saves(copied(tmp_path)), ("killed_saves",)) if line in place.source
    )

    def load():
        complete_saves(tmp_path)
        return torch.tensor([name == "new" for name in sorted(content(tmp_path))])

    with Parked(lambda: complete_saves(tmp_path), place) as parked:
        assert parked.has_come
        threading.Timer(0.2, parked._go_on.set).start()
        assert in_child(load).tolist() == [True]
    assert content(tmp_path) == {"new"}
    assert not work.exists()
    assert not [name for name in os.listdir(tmp_path) if ".saving-" in name]


def copied(target):
    return Path(shutil.copytree(target, target.parent / "copy", dirs_exist_ok=True))


def test_a_complete_one_in_a_folder_that_cannot_be_written_to_is_no_error(gone, tmp_path, monkeypatch):
    half_saved(tmp_path, gone, moved=("unet/weights", "model_index.json"))
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: 1 / 0)
    complete_saves(tmp_path)
    assert content(tmp_path) == {"new"}


def test_what_cannot_be_completed_now_can_be_later(gone, tmp_path, monkeypatch):
    work = half_saved(tmp_path, gone)
    rename, renamed = Path.rename, []

    def full(self, other):
        renamed.append(self)
        if len(renamed) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, other)

    monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(OSError, match=r"was killed midway.*No space left"):
        complete_saves(tmp_path)
    assert work.exists()
    monkeypatch.undo()
    complete_saves(tmp_path)
    assert content(tmp_path) == {"new"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_save_that_goes_on_is_waited_for(tmp_path, monkeypatch):
    work = half_saved(tmp_path, writer())
    threading.Timer(0.1, (work / MOVES).unlink).start()
    complete_saves(tmp_path)
    assert not (work / MOVES).exists()
    monkeypatch.setattr("lowtide.killed_saves._WAIT_SECONDS", 0.1)
    (work / MOVES).write_text("{}")
    complete_saves(tmp_path)  # not for ever


@pytest.mark.parametrize("named", ["/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"])
def test_ids_of_another_container_or_before_the_machine_was_started_anew(gone, tmp_path, named, monkeypatch):
    """There the process may be running, or be another one."""
    work = half_saved(tmp_path, writer(), moves=False)
    ours = writer()
    read, link = Path.read_text, os.readlink
    monkeypatch.setattr("os.readlink", lambda path: "pid:[1]" if path == named else link(path))
    monkeypatch.setattr(
        "pathlib.Path.read_text", lambda path, **k: "another" if str(path) == named else read(path, **k)
    )
    assert writer() != ours
    assert is_running(*ours.split("-")) is None
    complete_saves(tmp_path)
    assert work.exists()
