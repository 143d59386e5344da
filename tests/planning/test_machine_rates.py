"""Rates of this machine: measured once, kept in a file that may be missing, foreign or broken."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowtide.machine import disk_and_link, kernel_rates
from lowtide.machine.child_process import ChildError
from lowtide.machine.disk_and_link import disk_read_rate
from lowtide.machine.figure_cache import cache_folder
from lowtide.machine.processor_share import Share
from lowtide.planning import machine_rates
from lowtide.planning.machine_rates import correct_rates
from lowtide.planning.workload import Work

ALONE, BUSY = Share(0.0, 0.1), Share(10_000.0, 9.0)
MEASURED = replace(machine_rates.assumed_rates(), device="cpu", assumed=False, cache=1, pinned_most=0)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """How often it was measured; nothing is, and what is kept is kept here."""
    times = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_rates, "_measured_elsewhere", lambda *given: times.append(given) or (MEASURED, ALONE))
    return times


def ask(dtype=torch.float32, **options):
    return machine_rates.machine_rates("cpu", dtype, **options)


def test_measured_once_for_each_dtype(measured, tmp_path):
    first = ask()
    assert replace(first, cache=1) == MEASURED
    assert first.cache > 2**20, "what is available is looked up at the time of planning"
    assert replace(ask(), cache=1) == MEASURED
    assert len(measured) == 1
    ask(torch.bfloat16)
    ask(refresh=True)
    assert len(measured) == 3
    assert len(list((tmp_path / "lowtide").iterdir())) == 2


def test_those_of_a_busy_machine_are_measured_again_once_it_is_quiet(measured, monkeypatch, capsys):
    monkeypatch.setattr(machine_rates, "_measured_elsewhere", lambda *given: measured.append(given) or (MEASURED, BUSY))
    ask()
    assert "Others were at work (load 9.0)" in capsys.readouterr().err
    monkeypatch.setattr(machine_rates, "is_busy", lambda threads: True)
    ask()
    assert len(measured) == 1, "it would be no better now"
    monkeypatch.setattr(machine_rates, "is_busy", lambda threads: False)
    ask()
    assert len(measured) == 2


def test_what_a_run_corrects_is_kept(measured):
    correct_rates(torch.device("cpu"), torch.float32, 2.0)  # nothing is kept yet
    before = ask()
    correct_rates(torch.device("cpu"), torch.float32, 2.0)
    work = Work(product=1e12, convolution=1e12, touched=1e9)
    assert ask().seconds(work) == pytest.approx(2 * before.seconds(work))
    assert len(measured) == 1
    assert ask(refresh=True).seconds(work) == pytest.approx(before.seconds(work))


@pytest.fixture
def small_shapes(monkeypatch):
    for name, shape in {"CONVOLUTIONS": (2, 16, 8), "CHANNELS_LAST": (1, 16, 8), "PRODUCTS": (16, 32, 8)}.items():
        monkeypatch.setattr(kernel_rates, name, (shape,))
    monkeypatch.setattr(kernel_rates, "ATTENTIONS", ((32, 2, 8),))
    monkeypatch.setattr(disk_and_link, "_FILE_BYTES", 2**20)
    monkeypatch.setattr(disk_and_link, "_CHUNK", 2**18)


def run_here(name, *arguments, seconds):
    """What the process that measures does, in this one, and what it prints."""
    assert name == machine_rates.__name__
    assert seconds > 60
    with redirect_stdout(io.StringIO()) as printed:
        machine_rates._main(*arguments)
    return printed.getvalue()


@pytest.mark.parametrize("elsewhere", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "elsewhere"])
@pytest.mark.usefixtures("small_shapes")
def test_this_machine_is_measured(monkeypatch, tmp_path, elsewhere):
    """As it is, in a process of its own, with `slow`; its smallest shapes in this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_rates, "is_busy", lambda threads: True)  # else a busy moment's are measured again
    if not elsewhere:
        monkeypatch.setattr(machine_rates, "run_module", run_here)
    rates = ask()
    assert not rates.assumed
    assert rates == replace(ask(), cache=rates.cache), "the second time they are read from the file"


def of_another_key(text):
    return text.replace('"cpu"', '"cuda"', 1)


def without_a_rate(text):
    content = json.loads(text)
    del content["figures"]["link"]
    return json.dumps(content)


def with_nothing_a_second(text):
    content = json.loads(text)
    return json.dumps({**content, "figures": {**content["figures"], "disk": 0}})


def with_words(text):
    content = json.loads(text)
    return json.dumps({**content, "figures": {**content["figures"], "disk": "fast"}})


BROKEN = [
    of_another_key,
    without_a_rate,
    with_nothing_a_second,
    with_words,
    lambda _: "",
    lambda _: "[]",
    lambda _: "\0",
    lambda _: "[" * 10_000,
    lambda text: text + " " * 2**17,
]


@pytest.mark.parametrize("breaking", BROKEN)
def test_a_file_that_is_not_ours_is_measured_over(measured, tmp_path, breaking):
    ask()
    (file,) = (tmp_path / "lowtide").iterdir()
    file.write_text(breaking(file.read_text()))
    assert replace(ask(), cache=1) == MEASURED
    assert len(measured) == 2
    ask()
    assert len(measured) == 2


def test_a_folder_that_cannot_be_made_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert replace(ask(), cache=1) == MEASURED
    assert replace(ask(), cache=1) == MEASURED, "and nothing more is said"
    assert len(measured) == 2


def test_the_usual_folder_is_in_the_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().parts[-2:] == (".cache", "lowtide")


def test_without_a_home_it_is_measured_every_time_and_said(measured, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert cache_folder() is None
    with pytest.warns(UserWarning, match="no home folder.*XDG_CACHE_HOME"):
        assert replace(ask(), cache=1) == MEASURED


def test_where_measuring_fails_usual_figures_are_assumed_and_the_reason_is_said(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ChildError("it ended with status 1: no such kernel")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_rates, "run_module", fail)
    with pytest.warns(UserWarning, match="usual figures: .*no such kernel"):
        assert ask().assumed
    assert not list(tmp_path.rglob("*.json"))  # to be measured another time


@pytest.mark.usefixtures("small_shapes")
def test_computing_is_measured():
    computing = kernel_rates.Computing(torch.device("cpu"), torch.float32)
    for name in ("convolution", "channels_last", "product", "attention", "touched", "dequantized"):
        assert getattr(computing, name)() > 1e4
    assert 0 < computing.kernel() < 1e-2
    assert 0 <= computing.renewing() < 1e-8


def test_where_kernels_are_slow_the_smallest_shape_speaks_for_all(monkeypatch):
    shapes = []
    monkeypatch.setattr(kernel_rates, "PRODUCTS", ((16, 32, 8), (32, 32, 8)))
    monkeypatch.setattr(kernel_rates.F, "linear", lambda x, _: shapes.append(len(x)))
    computing = kernel_rates.Computing(torch.device("cpu"), torch.float32)
    computing.product()
    assert len(shapes) > 2
    assert set(shapes) == {16, 32}
    shapes.clear()
    monkeypatch.setattr(kernel_rates, "_SLOW", 0.0)
    assert computing.product() > 0
    assert shapes == [16]


def test_shapes_are_measured_from_the_smallest_on():
    work = {
        "CONVOLUTIONS": lambda count, channels, side: count * channels**2 * side**2,
        "CHANNELS_LAST": lambda count, channels, side: count * channels**2 * side**2,
        "PRODUCTS": lambda rows, before, after: rows * before * after,
        "ATTENTIONS": lambda tokens, heads, features: tokens**2 * heads * features,
    }
    for name, amount in work.items():
        amounts = [amount(*shape) for shape in getattr(kernel_rates, name)]
        assert amounts == sorted(amounts), name


@pytest.mark.usefixtures("small_shapes")
def test_a_file_is_mapped_and_read_again(tmp_path):
    found = disk_read_rate(tmp_path)
    assert found.again > 0
    assert found.mapped > 0


def test_a_disk_that_cannot_be_written_is_assumed_aloud(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("read-only")

    monkeypatch.setattr(machine_rates, "disk_read_rate", refuse)
    with pytest.warns(UserWarning, match="cannot be measured"):
        assert machine_rates._disk(tmp_path).read is None


def test_assumed_rates_say_so_and_time_what_is_computed():
    assumed = machine_rates.assumed_rates("float32")
    assert assumed.assumed
    assert assumed.seconds(Work(product=1e12)) > machine_rates.assumed_rates("float16").seconds(Work(product=1e12)) > 0


def test_where_there_is_no_room_to_measure_usual_figures_are_assumed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_rates, "host_memory", lambda: SimpleNamespace(available=5 * 10**8, total=10**9))
    monkeypatch.setattr(machine_rates, "run_module", lambda *_, **__: pytest.fail("a process was begun"))
    found = machine_rates.machine_rates("cpu", torch.float32)
    assert found.assumed
    assert found.cache == 5 * 10**8
    assert not list(tmp_path.rglob("*.json"))  # to be measured another time
