"""Speeds of dtypes: measured once, again where others were at work, and never for long."""

import json

import pytest
import torch

from lowtide.machine import dtype_speeds as module
from lowtide.machine.child_process import ChildError

SPEED = dict.fromkeys(module.DtypeSpeeds.__annotations__, 2e9)
ALONE = {**dict.fromkeys(module.DTYPES, SPEED), "others": 0.0, "load": 0.1, "busy": False}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured, and how often it was; what is kept is kept here. `again` asks as another process would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "is_busy", lambda threads: False)
    seen = {"figures": ALONE, "times": 0}

    def measure():
        seen["times"] += 1
        return seen["figures"]

    monkeypatch.setattr(module, "_measured_elsewhere", measure)
    return seen


def again(monkeypatch):
    monkeypatch.setattr(module, "_asked", {})
    return module.dtype_speeds()


def test_they_are_measured_once_and_told(measured, monkeypatch, capsys):
    first = again(monkeypatch)
    assert first["bfloat16"].product == 2e9
    assert "once, for a second" in capsys.readouterr().err
    assert again(monkeypatch) == module.dtype_speeds() == first
    assert measured["times"] == 1
    assert capsys.readouterr().err == ""
    module.dtype_speeds(refresh=True)
    assert measured["times"] == 2


def test_those_of_a_busy_machine_are_measured_again_once_it_is_quiet(measured, monkeypatch):
    measured["figures"] = {**ALONE, "busy": True}
    again(monkeypatch)
    monkeypatch.setattr(module, "is_busy", lambda threads: True)
    again(monkeypatch)
    assert measured["times"] == 1
    monkeypatch.setattr(module, "is_busy", lambda threads: False)
    measured["figures"] = {**ALONE, "float32": dict.fromkeys(SPEED, 3e9)}
    assert again(monkeypatch)["float32"].product == 3e9
    again(monkeypatch)
    assert measured["times"] == 2


@pytest.mark.parametrize("broken", [{}, {"float32": {}}, {**ALONE, "float16": {**SPEED, "product": 0}}, [1]])
def test_a_file_that_is_not_ours_is_measured_over(measured, monkeypatch, tmp_path, broken):
    again(monkeypatch)
    (file,) = (tmp_path / "lowtide").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "figures": broken}))
    assert again(monkeypatch)["float32"].product == 2e9
    assert measured["times"] == 2


def test_where_it_fails_nothing_is_known_and_the_reason_is_said(measured, monkeypatch):
    def fail():
        raise ChildError("no such kernel")

    monkeypatch.setattr(module, "_measured_elsewhere", fail)
    with pytest.warns(UserWarning, match="no such kernel"):
        assert again(monkeypatch) is None


def test_this_processor_is_measured(monkeypatch):
    monkeypatch.setattr(module, "_CONVOLUTIONS", ((1, 8, 8),))
    monkeypatch.setattr(module, "_PRODUCTS", ((8, 16, 8),))
    monkeypatch.setattr(module, "_ATTENTIONS", ((16, 2, 8),))
    monkeypatch.setattr(module, "_ELEMENTS", (2**12,))
    assert all(speed > 1e4 for speed in vars(module.measured_speeds(torch.float32)).values())


def test_a_slow_dtype_is_measured_on_the_smallest_shape_alone(monkeypatch):
    seconds, calls = iter([0.5]), []
    monkeypatch.setattr(module, "_once", lambda action: calls.append(action) or next(seconds))
    assert module._speed([(10, "small"), (1000, "large")]) == 20
    assert calls == ["small"]


def test_a_fast_one_is_measured_on_the_largest(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_once", lambda action: calls.append(action) or 1e-3)
    assert module._speed([(1, "small"), (2, "large")]) == pytest.approx(2000)
    assert set(calls) == {"small", "large"}
