"""The progress bar, on a terminal and off it."""

import io

import pytest
from rich.console import Console

from lowtide.progress import ProgressBar
from lowtide.stages import Stages


def run(bar):
    with Stages([bar]).stage("denoise", steps=3) as stage:
        for _ in range(3):
            stage.advance()


def test_without_a_terminal_a_stage_leaves_one_line(capfd):
    run(ProgressBar())
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert "denoise" in lines[0]
    assert "3/3" in lines[0]
    assert "s/it" in lines[0]


def test_disabled_shows_nothing(capfd):
    run(ProgressBar(disable=True))
    assert capfd.readouterr() == ("", "")


def test_a_stage_of_unknown_length_nested_in_another(capfd):
    stages = Stages([ProgressBar()])
    with stages.stage("call"), stages.stage("decode") as decode:
        decode.advance()
    err = capfd.readouterr().err
    assert err.index("call") < err.index("decode")


def test_an_interrupted_stage_gives_the_terminal_back(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    bar = ProgressBar()
    with pytest.raises(KeyboardInterrupt), Stages([bar]).stage("denoise", steps=9):
        raise KeyboardInterrupt
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in screen.getvalue()
    assert screen.getvalue().rindex(show) > screen.getvalue().rindex(hide)
    run(bar)
    assert "3/3" in screen.getvalue()


def test_markup_in_a_stage_name_is_shown_as_it_is(capfd):
    with Stages([ProgressBar()]).stage("[red]x"):
        pass
    assert "[red]x" in capfd.readouterr().err


def test_stages_that_take_turns_have_one_row_each(capfd):
    bar = ProgressBar(totals={"controlnet": 3, "unet": 6})
    stages = Stages([bar])
    for _ in range(3):
        for name, calls in (("controlnet", 1), ("unet", 2)):
            with stages.stage(name) as stage:
                for _ in range(calls):
                    stage.advance()
    assert capfd.readouterr().err == ""
    bar.close()
    first, second = capfd.readouterr().err.splitlines()
    assert ("controlnet" in first, "3/3" in first) == (True, True)
    assert ("unet" in second, "6/6" in second) == (True, True)
