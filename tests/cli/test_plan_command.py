"""`lowtide plan` with plans made by hand: what is asked, what is printed, and how refusals are told."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tests.planning import plans, processors
from typer.testing import CliRunner

from lowtide.cli import plan_command as command
from lowtide.cli.app import app
from lowtide.cli.plan_text import plans_table, shown_plans
from lowtide.machine import accelerators
from lowtide.planning.alternatives import More, Outlook, thinned
from lowtide.planning.plan import Budgets, Plan
from lowtide.sizes import parse_bytes


def outlook(plan, budgets=None, refusal=None):
    at_hand = plans.resident(plan)
    return Outlook(
        device=plan.device,
        budgets=budgets or plan.budgets,
        plan=None if refusal else plan,
        alternatives={"resident": at_hand, "smallest": plans.lossy(plan), "chosen": plan},
        minimum=Budgets(vram=1_234_000_000, ram=612_000_000),
        more=(More("ram", 2 * plans.GB, at_hand),),
        curve=tuple(plans.curve(plan)),
        assumed=plan.assumed,
        refusal=refusal,
        minimum_if_changed=Budgets(vram=plans.GB, ram=500_000_000) if refusal else None,
    )


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What planning is asked for, and what it answers; the test runs in an empty folder."""
    seen = {"answer": outlook(plans.on_cpu())}

    def look_at(asked, budget):
        seen.update(asked=asked, budget=budget)
        return seen["answer"]

    monkeypatch.setattr(command, "look_at", look_at)
    monkeypatch.setattr(accelerators, "best_device", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    return seen


def lowtide(*arguments):
    return CliRunner(env={"COLUMNS": "150"}).invoke(app, ["plan", *arguments])


def row(output, name):
    return next(line for line in output.splitlines() if name in line)


def test_the_chosen_plan_is_marked_and_stands_beside_others(found):
    result = lowtide("--ram", "1GB")
    assert result.exit_code == 0, result.output
    chosen = row(result.stdout, "→")
    for said in ("chosen", "0.92 GB", "38.9 s", "yes"):
        assert said in chosen
    assert "Chosen:  all weights by blocks from disk; decode row by row" in result.stdout
    assert "0.92 of 1.00 GB of memory, 38.9 s, exact up to rounding" in result.stdout
    assert "no" in row(result.stdout, "resident ").split()
    assert "changed: int8" in row(result.stdout, "smallest ")
    assert result.stdout.count("→") == 1


def test_below_stand_the_minimum_the_next_gigabyte_and_why(found):
    output = lowtide("--ram", "1GB").stdout
    assert "Minimum\n  0.62 GB of memory" in output
    assert "--ram 2GB would save 3.89 s (10%)" in output
    assert "Why\n  unet by blocks" in output


def test_a_gpu_that_is_not_there_is_planned_for_and_said_to_be_assumed(found):
    found["answer"] = outlook(plans.on_gpu())
    result = lowtide("--vram", "6GB", "--ram", "16GB", "--size", "1024", "--batch", "4")
    assert result.exit_code == 0, result.output
    assert (found["asked"].device, found["asked"].dtype) == ("cuda", "float16")
    assert "assumed rates" in result.stdout
    assert "4 × 1024x1024, 30 steps" in result.stdout
    assert "5.87 of 6.00 GB of GPU memory, 4.00 of 16.00 GB of host memory" in result.stdout


def test_rows_that_add_nothing_are_left_out_and_the_chosen_one_has_its_usual_name():
    plan = plans.on_cpu()
    usual = {"resident": plans.resident(plan), "blocks": plan}
    slower = replace(plans.scaled(plan, 1.0, 1.2), components={})
    found = replace(outlook(plan), alternatives={**usual, "leaves": slower, "smallest": plans.lossy(plan)})
    assert [name for name, _ in shown_plans(found)] == ["resident", "blocks", "smallest"]
    smaller = replace(plans.scaled(plan, 0.9, 1.2), components={})
    found = replace(found, alternatives={**usual, "leaves": smaller})
    assert [name for name, _ in shown_plans(found)] == ["resident", "blocks", "leaves"]


@pytest.mark.parametrize("make", [plans.on_cpu, plans.on_gpu])
def test_a_table_of_80_columns_has_a_line_a_plan(make):
    from rich.console import Console

    console = Console(width=80, color_system=None)
    plan = make()
    names = {"sequential, decode by rows": plans.resident(plan), "smallest": plans.scaled(plan, 0.5, 2)}
    with console.capture() as captured:
        console.print(plans_table(replace(outlook(plan), alternatives=names)))
    lines = captured.get().strip().splitlines()
    assert len([line for line in lines if "…" in line]) == 0
    assert len(lines) == 2 + len(shown_plans(replace(outlook(plan), alternatives=names)))


def test_what_is_asked_reaches_the_planning(found):
    lowtide("--size", "96x64", "--batch", "2", "--steps", "7", "--guidance", "1", "--allow", "int8", "--allow", "int8")
    size = {"height": 64, "width": 96, "pictures": 2, "prompts": 2, "steps": 7, "guided": False}
    assert found["asked"].run_size() == size
    assert (found["asked"].device, found["asked"].dtype) == ("cpu", "float32")
    assert found["budget"].allow == ("int8",)


def test_json_holds_everything_and_the_plan_can_be_put_to_work(found):
    content = json.loads(lowtide("--ram", "1GB", "--json").stdout)
    plan = plans.on_cpu()
    assert content["chosen"]["peak"] == plan.peak
    assert content["chosen"]["words"].startswith("all weights by blocks from disk")
    own = {name: content["chosen"][name] for name in plan.to_dict()}
    assert Plan.from_dict(own) == plan
    assert [one["name"] for one in content["alternatives"]] == ["resident", "smallest"]
    assert [one["fits"] for one in content["alternatives"]] == [False, True]
    assert content["minimum"]["ram"] == 612_000_000
    assert content["next_gigabyte"][0]["saves_seconds"] == pytest.approx(3.89)
    assert len(content["curve"]) == 6
    assert content["refusal"] is None


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_refusal_names_the_minimum_and_what_to_try(found, options):
    found["answer"] = outlook(plans.on_cpu(), Budgets(ram=plans.GB // 2), "Nothing fits 500 MB.")
    result = lowtide("--ram", "500MB", *options)
    assert result.exit_code == 2
    assert "Error: Nothing fits 500 MB." in result.stderr
    assert "--ram 0.62GB" in result.stderr
    assert "--allow int8" in result.stderr
    assert "which needs only --ram 0.50GB" in result.stderr
    if options:
        content = json.loads(result.stdout)
        assert content["chosen"] is None
        assert content["refusal"] == "Nothing fits 500 MB."
        assert content["minimum"]["ram"] == 612_000_000


def test_a_picture_of_what_does_not_fit_is_not_promised(found, tmp_path):
    found["answer"] = outlook(plans.on_cpu(), Budgets(ram=plans.GB // 2), "Nothing fits 500 MB.")
    result = lowtide("--ram", "500MB", "--plot", str(tmp_path / "plan.png"))
    assert result.exit_code == 2
    assert "plan.png was not written" in result.stderr
    assert not (tmp_path / "plan.png").exists()


def test_a_model_that_is_not_there_is_bad_input():
    result = lowtide("nothere")
    assert result.exit_code == 2
    assert "Error: No model at 'nothere'" in result.stderr


def test_the_minimum_is_rounded_so_that_it_works_when_typed():
    from lowtide.planning.alternatives import rounded_up

    for size in (1, 612_000_000, 999_999_999, 10**9, 1_234_567_890):
        assert parse_bytes(rounded_up(size)) >= size


def test_a_curve_keeps_its_ends_and_what_is_faster():
    plan = plans.on_cpu()
    paces = [1.0, 0.9999, 0.9998, 0.9, 0.8999, 0.8998]
    points = [(index, plans.scaled(plan, 1.0, pace)) for index, pace in enumerate(paces)]
    assert [budget for budget, _ in thinned(points)] == [0, 3, 5]
    assert thinned(points[:1]) == points[:1]


def test_a_plan_on_a_gpu_must_keep_every_budget():
    plan = plans.on_gpu()
    assert outlook(plan).fits(plan)
    for name in ("vram", "ram"):
        assert not outlook(plan, replace(plan.budgets, **{name: plans.GB})).fits(plan)


@pytest.mark.parametrize("make", [plans.on_cpu, plans.on_gpu])
def test_the_picture_is_written(found, make):
    found["answer"] = outlook(make())
    result = lowtide("--plot", "plan.png", "--device", "auto")
    assert result.exit_code == 0, result.output
    assert "Written: plan.png" in result.stderr
    with Image.open("plan.png") as picture:
        assert picture.width > 1500


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ram", "lots"], "--ram lots: Give bytes or a size"),
        (["--ram", "120%"], "at most 100 %"),
        (["--disk", "1 parsec"], "--disk"),
        (["--vram", "6GB", "--device", "cpu"], "all memory is --ram"),
        (["--device", "tpu"], "auto, cpu, cuda, xpu, mps"),
        (["--batch", "0"], "--batch 0"),
        (["--steps", "0"], "--steps=0 is not possible: it must be a whole number, at least 1"),
        (["--guidance", "-1"], "7.5 is usual"),
        (["--frames", "9"], "makes pictures"),
        (["--allow", "fp4"], "blended_tiling"),
        (["--size", "130"], "nearest is 128x128"),
        (["--plot", "plan.jpg"], ".png"),
        (["--plot", "no/plan.png"], "no folder"),
        (["./nope"], "no such folder"),
    ],
)
def test_what_cannot_be_is_told_before_any_planning(found, arguments, told):
    result = lowtide(*arguments)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert "asked" not in found


def test_the_fastest_dtype_is_planned_and_told(found, monkeypatch):
    processors.use(monkeypatch, processors.FOR_BFLOAT16)
    result = lowtide("--ram", "1GB")
    assert result.exit_code == 0, result.output
    assert found["asked"].dtype == "bfloat16"
    assert "Computing in bfloat16: by what was measured here, float32 takes 2.0× as long." in result.stderr


def test_where_only_a_slower_dtype_fits_it_is_planned_and_told(found, monkeypatch):
    processors.use(monkeypatch, processors.FOR_BFLOAT16)

    def look_at(asked, _):
        found["asked"] = asked
        return outlook(plans.on_cpu(), refusal="too little" if asked.dtype == "bfloat16" else None)

    monkeypatch.setattr(command, "look_at", look_at)
    result = lowtide("--ram", "1GB")
    assert result.exit_code == 0, result.output
    assert found["asked"].dtype == "float32"
    assert "In bfloat16 it would be faster, and does not fit the budget." in result.stderr


def test_a_slow_dtype_that_is_asked_for_is_planned_with_a_warning(found, monkeypatch):
    processors.use(monkeypatch, processors.FOR_FLOAT32)
    result = lowtide("--ram", "1GB", "--dtype", "bfloat16")
    assert found["asked"].dtype == "bfloat16"
    assert (
        "Warning: bfloat16 is slow on this processor: computing takes 60 times as long as in float32." in result.stderr
    )
