"""`lowtide bench table` as a user calls it: with stand-in runs, and once with real processes and a tiny model."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tests import tiny
from tests.bench import samples
from typer.testing import CliRunner

from lowtide.bench import children, plot
from lowtide.bench.runs import Job
from lowtide.cli import bench
from lowtide.cli.app import app


def table(*arguments):
    return CliRunner().invoke(app, ["bench", "table", "--device", "cpu", *arguments])


def told(result):
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Runs that take no time: what is asked of them, and outcomes that a test may set."""

    class StandIn:
        def __init__(self):
            self.calls, self.outcomes = (), {}

        def __call__(self, options, job):
            self.calls = (*self.calls, (options, job))
            found = self.outcomes.get((job.technique, job.library), samples.reading(2.0))
            if isinstance(found, BaseException):
                raise found
            return (None, found) if isinstance(found, str) else (found, None)

    stand_in = StandIn()
    monkeypatch.setattr(children, "run_apart", stand_in)
    monkeypatch.setattr(plot, "draw_plot", lambda report: report.options.out / "table.png")
    monkeypatch.setattr(bench, "_picture_size", lambda model, variant, size: size or (128, 128))
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_all_options_reach_the_runs(stand_in):
    options = "--rows half,traced --steps 3 --runs 2 --batch 2 --size 96x64 --seed 5 --variant fp16 --timeout 9"
    result = table(*options.split(), "--prompt", "sea", "--out", "here/there")
    assert result.exit_code == 0, result.output
    asked = [(job.technique, job.library) for _, job in stand_in.calls]
    assert asked == [("half", "lowtide"), ("traced", "lowtide")] * 2
    options = stand_in.calls[0][0]
    assert (options.width, options.height, options.steps, options.batch) == (96, 64, 3, 2)
    assert (options.seed, options.variant, options.timeout, options.prompt) == (5, "fp16", 9.0, "sea")
    assert (options.device, options.half, options.peer) == ("cpu", "bfloat16", None)
    assert {"table.json", "table.md"} <= set(os.listdir("here/there"))


def test_the_defaults_are_the_documents(stand_in):
    assert table().exit_code == 0
    options, _ = stand_in.calls[0]
    assert options.steps == 50
    assert options.rows[:5] == ("original", "half", "channels-last", "traced", "attention")
    assert options.rounds == 3
    assert json.loads((options.out / "table.json").read_text())["complete"] is True


def test_failures_are_told_at_once_and_in_the_table(stand_in):
    stand_in.outcomes["traced", "lowtide"] = "RuntimeError: no trace"
    result = table("--rows", "half,traced", "--runs", "3")
    assert result.exit_code == 0
    assert "traced (lowtide) failed: RuntimeError: no trace" in result.stderr
    assert "| traced UNet | failed: RuntimeError: no trace | – |" in result.stdout
    assert len(stand_in.calls) == 4


def test_when_every_run_fails_so_does_the_command(stand_in):
    stand_in.outcomes["half", "lowtide"] = "killed (out of memory?)"
    result = table("--rows", "half")
    assert result.exit_code == 1
    assert "every run failed" in result.stderr
    assert "killed (out of memory?)" in result.stdout
    assert set(os.listdir("bench-table")) == {"table.json", "table.md"}


def test_ctrl_c_keeps_what_is_there(stand_in):
    stand_in.outcomes["traced", "lowtide"] = KeyboardInterrupt()
    result = table("--rows", "half,traced")
    assert result.exit_code == 130
    assert "| half precision | 2.00 |" in result.stdout
    assert "| traced UNet | – |" in result.stdout
    assert "The table holds the runs that had ended" in result.stderr
    assert json.loads(Path("bench-table/table.json").read_text())["complete"] is False


def test_ctrl_c_before_anything_writes_nothing(stand_in):
    stand_in.outcomes["half", "lowtide"] = KeyboardInterrupt()
    result = table("--rows", "half")
    assert result.exit_code == 130
    assert "nothing is written" in result.stderr
    assert os.listdir("bench-table") == []


def test_json_is_there_after_each_round(stand_in, monkeypatch):
    stand_in.outcomes["half", "lowtide"] = samples.reading()
    seen = []
    call = type(stand_in).__call__

    def looking(options, job):
        path = options.out / "table.json"
        seen.append(len(json.loads(path.read_text())["runs"]) if path.exists() else 0)
        return call(stand_in, options, job)

    monkeypatch.setattr(children, "run_apart", looking)
    assert table("--rows", "half,traced", "--runs", "3").exit_code == 0
    assert seen == [0, 0, 2, 2, 4, 4]


def test_without_matplotlib_the_rest_is_written(stand_in, monkeypatch):
    missing = {"matplotlib"}
    found = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    result = table("--rows", "half")
    assert result.exit_code == 0
    assert "pip install 'lowtide[bench]'" in result.stderr
    assert set(os.listdir("bench-table")) == {"table.json", "table.md"}


def test_a_missing_peer_is_told_before_anything_runs(stand_in, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    result = table("--peer", "diffusers")
    assert result.exit_code == 2
    assert "--peer diffusers: it is not installed here" in result.stderr
    assert stand_in.calls == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows", "half,halv"], "--rows halv: possible are original, half"),
        (["--rows", ","], "possible are original"),
        (["--size", "130"], "nearest is 128x128"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--device", "cuda:99"], "doctor"),
        (["--runs", "0"], "at least one round"),
        (["--batch", "0"], "at least one picture"),
        (["--steps", "0"], "--steps=0 is not possible: it must be a whole number, at least 1"),
        (["--timeout", "0"], "seconds above 0"),
        (["--timeout", "nan"], "seconds above 0"),
        (["--seed", "-1"], "from 0 to"),
        (["--prompt", " "], "prompt is empty"),
        (["--dtype", "float32"], "bfloat16"),
        (["--peer", "other"], "diffusers"),
        (["--model", "./nope"], "no such folder"),
        (["--out", "file/x"], "Cannot write in file"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_is_possible(stand_in, arguments, words):
    with open("file", "w"):
        pass
    result = table(*arguments)
    assert result.exit_code == 2
    assert words in told(result)
    assert "Traceback" not in result.stderr
    assert stand_in.calls == ()


def test_float16_on_a_cpu_is_warned_of(stand_in):
    result = table("--rows", "half", "--dtype", "float16")
    assert "emulated" in result.stderr
    assert stand_in.calls[0][0].half == "float16"


def test_on_a_gpu_half_precision_is_float16():
    assert bench.resolve_half(bench.Half.AUTO, "cuda") == "float16"
    assert bench.resolve_half(bench.Half.BFLOAT16, "cuda") == "bfloat16"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.pipeline(folder / "parts").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--size", "36x32"], "multiples of 8"), (["--variant", "fp8"], "fp8"), (["--model", "{tmp}"], "model_index")],
)
def test_what_the_model_cannot_do_is_told_before_anything_runs(model, tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(children, "run_apart", lambda *_: 1 / 0)
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = table("--model", model, "--out", str(tmp_path / "out"), *given)
    assert result.exit_code in (1, 2)
    assert words in told(result)


@pytest.mark.slow
def test_two_rows_of_a_real_model_each_in_a_fresh_process(model, tmp_path):
    options = f"--model {model} --rows original,half --runs 1 --steps 1 --prompt sea --out {tmp_path}"
    result = table(*options.split())
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 4
    assert "failed" not in result.output
    found = json.loads((tmp_path / "table.json").read_text())
    assert [run["technique"] for run in found["runs"]] == ["original", "half"]
    assert len({run["reading"]["checksum"] for run in found["runs"]}) == 2
    assert (found["options"]["width"], found["options"]["height"]) == (32, 32)
    assert "32x32, 1 DDIM step" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "table.png") as picture:
        assert picture.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]


@pytest.mark.parity
@pytest.mark.slow
def test_the_peer_in_a_process_of_its_own(model, tmp_path):
    pytest.importorskip("diffusers")
    options = samples.options(("model-offload",), model=model, peer="diffusers", out=tmp_path)
    found, failure = children.run_apart(options, Job("model-offload", "diffusers"))
    assert found is None
    assert failure.startswith("RuntimeError: ")
