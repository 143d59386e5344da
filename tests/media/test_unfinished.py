"""Files that are not whole: none is left for good, and nobody else's is touched."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from lowtide.media import unfinished
from lowtide.media.png import PictureFile, PngWriter
from lowtide.media.unfinished import KEPT_SECONDS, remove_stale, unfinished_path, whole_or_not, writer

MACHINE = writer().partition("-")[0]


@pytest.fixture(scope="module")
def gone():
    """The id of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def put(folder, name, *, days=0):
    (folder / name).write_text("half")
    then = time.time() - days * 24 * 3600
    os.utime(folder / name, (then, then))
    return name


def write_picture(folder):
    with PngWriter(PictureFile(folder / "new.png"), 4, 4) as png:
        png.write(np.zeros((4, 4, 3), dtype=np.uint8))


def write_file(folder):
    with whole_or_not(folder / "new.png") as path:
        path.write_text("whole")


@pytest.mark.parametrize("write", [write_picture, write_file])
def test_what_dead_processes_left_goes_when_the_next_file_is_written(write, gone, tmp_path):
    put(tmp_path, f".x.png.{MACHINE}-{gone}-0.tmp")
    put(tmp_path, f".a clip.mp4.{MACHINE}-{gone}-12.tmp")
    write(tmp_path)
    assert os.listdir(tmp_path) == ["new.png"]


def test_what_others_have_stays(gone, tmp_path):
    names = {
        put(tmp_path, f".x.png.{MACHINE}-{os.getpid()}-7.tmp", days=30),  # of a process that is running
        put(tmp_path, f".x.png.0123abcd-{gone}-0.tmp", days=6),  # of another machine: it may be running there
        put(tmp_path, f".x.png.{gone}.tmp", days=30),
        put(tmp_path, f"x.png.{MACHINE}-{gone}-0.tmp", days=30),
        put(tmp_path, f".x.png.{MACHINE}-{gone}-0.tmp.png", days=30),
    }
    (tmp_path / f".d.png.{MACHINE}-{gone}-0.tmp").mkdir()
    (tmp_path / f".l.png.{MACHINE}-{gone}-0.tmp").symlink_to(tmp_path / "new.png")
    write_file(tmp_path)
    assert names <= set(os.listdir(tmp_path))
    assert len(os.listdir(tmp_path)) == len(names) + 3


def test_of_another_machine_it_goes_after_a_week(gone, tmp_path):
    put(tmp_path, f".x.png.0123abcd-{gone}-0.tmp", days=8)
    write_file(tmp_path)
    assert os.listdir(tmp_path) == ["new.png"]


def test_of_another_user_nothing_goes(gone, tmp_path, monkeypatch):
    name = put(tmp_path, f".x.png.{MACHINE}-{gone}-0.tmp")
    monkeypatch.setattr(unfinished.os, "geteuid", lambda: os.getuid() + 1)
    write_file(tmp_path)
    assert name in os.listdir(tmp_path)


def test_a_file_without_an_owner_stays_for_a_week(tmp_path):
    names = re.compile(r"kept(?:-([0-9a-f]{8})-(\d+))?")
    put(tmp_path, "kept", days=6)
    remove_stale(tmp_path, names)
    assert os.listdir(tmp_path) == ["kept"]
    put(tmp_path, "kept", days=KEPT_SECONDS / 86400 + 1)
    remove_stale(tmp_path, names)
    assert os.listdir(tmp_path) == []


def test_names_are_our_own_and_a_folder_that_is_missing_is_no_error(tmp_path):
    paths = [unfinished_path(tmp_path / "none" / "x.png") for _ in range(2)]
    assert paths[0] != paths[1]
    assert all(f"-{os.getpid()}-" in path.name for path in paths)
