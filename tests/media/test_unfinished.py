"""Files that are not whole: none is left for good, and nobody else's is touched."""

import errno
import os
import re
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from lowtide.cli.errors import InputError
from lowtide.cli.pictures import prepare_folders
from lowtide.media import unfinished
from lowtide.media.png import PictureFile, PngWriter
from lowtide.media.unfinished import KEPT_SECONDS, remove_stale, unfinished_path, whole_or_not, writer
from lowtide.pipelines.picture_files import picture_files

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


WRITES = [write_picture, write_file]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_the_mode_of_the_file_that_was_there_is_kept(write, mode, tmp_path):
    target = tmp_path / "new.png"
    target.write_text("old")
    target.chmod(mode)
    write(tmp_path)
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_bytes() != b"old"
    assert os.listdir(tmp_path) == ["new.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo") or os.geteuid() != 0, reason="gives a file to another user")
def test_and_its_owner_where_that_may_be(tmp_path):
    target = tmp_path / "new.png"
    target.write_text("old")
    os.chown(target, 54321, 54321)
    write_file(tmp_path)
    assert (target.stat().st_uid, target.stat().st_gid) == (54321, 54321)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("write", WRITES)
def test_a_pipe_is_refused_and_stays(write, tmp_path):
    os.mkfifo(tmp_path / "new.png")
    with pytest.raises(OSError, match=r"pipe.*new\.png"):
        write(tmp_path)
    assert stat.S_ISFIFO((tmp_path / "new.png").stat().st_mode)
    assert os.listdir(tmp_path) == ["new.png"]


@pytest.mark.parametrize("write", WRITES)
def test_a_file_that_may_not_be_written_to_is_refused_and_stays(write, tmp_path, monkeypatch):
    (tmp_path / "new.png").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # the superuser may write to all
    with pytest.raises(PermissionError, match=r"may not be written to.*new\.png"):
        write(tmp_path)
    assert (tmp_path / "new.png").read_text() == "old"


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*new\.png"), whole_or_not(tmp_path / "new.png"):
        full()
    monkeypatch.setattr(PngWriter, "_chunk", full)
    with pytest.raises(OSError, match=r"No space left on device.*new\.png"):
        write_picture(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_the_command_and_the_pipeline_refuse_a_pipe_before_any_work(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x\.png: It is a pipe"):
        prepare_folders([tmp_path / "x.png"])
    with pytest.raises(OSError, match="pipe"):
        picture_files(tmp_path / "x.png", 1)
