"""The line of a step and the choice between a budget and one's own, without a model."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from tests.planning import plans

from lowtide.cli.budget_options import Allow, Budget, budget_from
from lowtide.cli.errors import InputError
from lowtide.cli.live import Sources, StepLines
from lowtide.progress import ProgressBar
from lowtide.stages import Stages


class Machine:
    """A clock, memory and waiting that the test moves."""

    def __init__(self):
        self.now, self.waited, self.used = 0.0, 0.0, 910_000_000

    def sources(self):
        return Sources(lambda: self.used, lambda: self.waited, lambda: self.now)

    def pass_time(self, seconds, waited=0.0):
        self.now += seconds
        self.waited += waited


def test_a_step_is_told_with_its_bound_memory_and_waiting():
    machine = Machine()
    lines = StepLines(plans.on_cpu(), machine.sources())
    with Stages([lines]).stage("denoise", steps=30) as stage:
        assert lines.line == ""
        machine.pass_time(0.94, waited=0.0282)
        stage.advance()
        assert lines.line == "0.94 s (bound 0.90 compute) RAM 0.91/1.00 GB stall 3 %"
        machine.pass_time(2.0, waited=1.0)
        stage.advance()
        assert lines.line == "2.00 s (bound 0.90 compute) RAM 0.91/1.00 GB stall 50 %"
    assert lines.line == ""


def test_a_gpu_is_told_as_such_and_a_stage_without_a_plan_has_no_bound():
    machine = Machine()
    lines = StepLines(plans.on_gpu(), machine.sources())
    with Stages([lines]).stage("write", steps=2) as stage:
        machine.pass_time(1.0)
        stage.advance()
        assert lines.line == "1.00 s GPU 0.91/6.00 GB stall 0 %"


def test_the_bound_of_a_row_is_its_share_of_the_stages():
    machine = Machine()
    lines = StepLines(plans.on_cpu(), machine.sources())
    with Stages([lines]).stage("decode", steps=93) as stage:
        machine.pass_time(0.2)
        stage.advance()
        assert "(bound 0.10 compute)" in lines.line


@pytest.mark.parametrize(("steps", "count"), [(3, 3), (10, 10), (30, 11), (1000, 11), (25, 11)])
def test_where_nothing_can_be_redrawn_about_every_tenth_step_is_told(steps, count):
    machine, told = Machine(), []
    lines = StepLines(plans.on_cpu(), machine.sources(), told.append)
    with Stages([lines]).stage("denoise", steps=steps) as stage:
        for _ in range(steps):
            machine.pass_time(1.0)
            stage.advance()
    assert len(told) == count
    assert told[0].startswith(f"denoise 1/{steps} 1.00 s")
    assert told[-1].startswith(f"denoise {steps}/{steps} ")


def test_on_a_terminal_the_bar_shows_the_line_and_ends_with_the_pace(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    machine = Machine()
    lines = StepLines(plans.on_cpu(), machine.sources())
    bar = ProgressBar(note=lambda: lines.line)
    with Stages([lines, bar]).stage("denoise", steps=2) as stage:
        for _ in range(2):
            machine.pass_time(0.5)
            stage.advance()
    shown = screen.getvalue()
    assert "denoise            2/2 0.50 s (bound 13.50 compute) RAM 0.91/1.00 GB stall 0 %" in shown
    assert "s/it" in shown.splitlines()[-2]


def test_a_stage_that_does_not_know_its_steps_has_those_of_its_plan_in_all_visits():
    plan, told = plans.on_cpu(), []
    calls = plan.stage("denoise").calls
    stages = Stages([StepLines(plan, Machine().sources(), told.append)])
    for _ in range(calls):
        with stages.stage("denoise") as stage:
            stage.advance()
    assert told[0].startswith(f"denoise 1/{calls} ")
    assert told[-1].startswith(f"denoise {calls}/{calls} ")


def test_stages_that_are_not_planned_print_no_lines():
    told = []
    with Stages([StepLines(plans.on_cpu(), Machine().sources(), told.append)]).stage("write", steps=4) as stage:
        for _ in range(4):
            stage.advance()
    assert told == []


@pytest.mark.parametrize("size", ["6GB", "80%", "auto", "-1GB", "1.5 GiB", "512mb"])
def test_budgets_may_be_sizes_shares_and_what_is_left(size):
    assert budget_from(None, size, []) == Budget(ram=size)


@pytest.mark.parametrize("size", ["", "6 apples", "101%", "-", "--1GB", "GB"])
def test_other_budgets_are_refused(size):
    with pytest.raises(InputError, match="--vram"):
        budget_from(size, None, [])


def test_a_budget_and_ones_own_choice_exclude_each_other():
    assert budget_from(None, None, [], ["--offload block"]) is None
    with pytest.raises(InputError, match="--ram 4GB with --offload block: give either a budget or your own choice"):
        budget_from(None, "4GB", [], ["--offload block"])
    with pytest.raises(InputError, match="--allow fp8 is for a budget"):
        budget_from(None, None, [Allow.FP8])


def test_the_size_of_a_run_is_what_the_request_says():
    from lowtide.cli.fitted import run_size

    request = SimpleNamespace(size=(96, 64), video=None, steps=4, guidance=1.0)
    assert run_size(request) == {"height": 64, "width": 96, "output": "file", "steps": 4, "guided": False}
    clip = SimpleNamespace(size=None, video=SimpleNamespace(frames=9), steps=50, guidance=6.0)
    assert run_size(clip) == {"frames": 9, "steps": 50, "guided": True}
