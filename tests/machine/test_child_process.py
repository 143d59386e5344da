"""Children that measure: what they print, how they fail, and that none outlives its parent."""

import sys

import psutil
import pytest
from tests.machine import processes

from lowtide.machine.child_process import ChildError, run_module

SLEEPER = "import os, pathlib, time; pathlib.Path({0!r}).write_text(str(os.getpid())); time.sleep(60)"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(text):
        (tmp_path / "measured_here.py").write_text(text)
        return "measured_here"

    return write


def test_what_it_prints(module):
    name = module("import sys; print(__name__, sys.argv[1:])")
    assert run_module(name, "a", "b").strip() == "__main__ ['a', 'b']"


def test_a_failure_is_named_with_its_last_line(module):
    with pytest.raises(ChildError, match=r"measured_here ended with code 1: ValueError: no such kernel"):
        run_module(module("raise ValueError('no such kernel')"))


def test_one_that_takes_too_long_is_ended(module, tmp_path):
    pid_file = tmp_path / "pid"
    name = module(SLEEPER.format(str(pid_file)))
    with pytest.raises(ChildError, match="took longer than 2 s"):
        run_module(name, seconds=2.0)
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_it_ends_with_its_parent(module, tmp_path):
    pid_file = tmp_path / "pid"
    name = module(SLEEPER.format(str(pid_file)))
    assert processes.child_ends_with_parent(
        f"from lowtide.machine.child_process import run_module; run_module({name!r})", pid_file
    )


def test_the_current_folder_hides_no_module(module, tmp_path, monkeypatch):
    name = module("import runpy; print('went well')")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "cwd" / "runpy.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])
    assert run_module(name).strip() == "went well"
