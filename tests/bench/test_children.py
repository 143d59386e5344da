"""A run's process: what it answers, and how a process that gives no answer is told. Stand-ins are small scripts."""

import json
import os
import sys

import pytest
from tests.bench import samples
from tests.machine import processes

from lowtide.bench import children
from lowtide.bench.runs import Job

HALF = Job("half", "lowtide")
ANSWER = {"reading": {**vars(samples.reading())}}


@pytest.fixture
def outcome(monkeypatch, tmp_path):
    """What a run comes to, whose process runs the given code."""

    def of(code, **changes):
        monkeypatch.setattr(children, "command", lambda: [sys.executable, "-c", code])
        found = children.run_apart(samples.options(out=tmp_path, **changes), HALF)
        assert list(tmp_path.iterdir()) == []
        return found

    return of


def saying(answer):
    return f"print({json.dumps({children.ANSWER: answer})!r})"


def test_an_answer_is_found_among_other_output(outcome):
    code = f"print('loading', end=''); print(); {saying(ANSWER)}; print('bye lowtide_run {{')"
    assert outcome(code) == (samples.reading(), None)


def test_the_process_gets_its_orders_and_an_empty_folder(outcome):
    code = (
        "import json, os, sys\nspec = json.loads(sys.stdin.read())\nopen(spec['folder'] + '/left', 'w').close()\n"
        "assert (spec['technique'], spec['dtype'], os.environ['CUDA_VISIBLE_DEVICES']) == ('half', 'bfloat16', '')\n"
        f"{saying(ANSWER)}"
    )
    assert outcome(code) == (samples.reading(), None)


def test_an_error_is_told_by_its_first_line(outcome):
    assert outcome(saying({"failure": "ValueError: not\nhere"})) == (None, "ValueError: not")
    _, reason = outcome(saying({"failure": "ValueError: " + "long " * 50}))
    assert len(reason) <= children.LONGEST_REASON
    assert reason.endswith("…")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed (out of memory?)"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import sys; sys.exit('no such thing')", "ended with code 1: no such thing"),
        ("", "ended with code 0"),
        ("print('lowtide_run'); print('[\"lowtide_run\"]')", "ended with code 0"),
    ],
)
def test_a_process_without_an_answer(outcome, code, reason):
    assert outcome(code) == (None, reason)


def test_a_run_that_takes_too_long_is_ended(outcome, tmp_path):
    code = "import time; time.sleep(60)"
    assert outcome(code, timeout=0.2) == (None, "took longer than 0.2 s")


def test_modules_are_looked_for_where_this_process_looks(monkeypatch):
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    assert "-P" not in children.command()
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])
    assert children.command()[1] == "-P"


def test_a_run_ends_with_the_process_that_started_it(tmp_path, monkeypatch):
    """Killed at once, that process can end nothing itself."""
    pid_file = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    program = (
        "from lowtide.bench import children\nfrom lowtide.bench.runs import Job\nfrom tests.bench import samples\n"
        "children._MODULE = 'sleeper'\n"
        f"children.run_apart(samples.options(out={str(tmp_path)!r}), Job('half', 'lowtide'))"
    )
    assert processes.child_ends_with_parent(program, pid_file)
