"""Reports of runs: what was measured beside the plan, what flowed, and memory over time."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console
from tests.planning import plans

from lowtide.bench.plan_plot import parts_of, plot_plan
from lowtide.bench.timeline_plot import plot_timeline
from lowtide.fitting.run_report import run_report
from lowtide.measuring.meter import StageReading
from lowtide.measuring.peaks import Peaks
from lowtide.measuring.timeline import Sample, Samples, StageMark, Timeline
from lowtide.measuring.transfers import Flow, FlowMeter, total_flow
from lowtide.memory import Meter
from lowtide.memory.ledger import Ledger
from lowtide.planning.explain import asked_in_words, in_words, seconds_in_words
from lowtide.stages import Stages

MB = plans.MB


def reading(name, seconds, rss, cuda=None):
    return StageReading(name, 0, seconds, rss * MB, None, None, cuda, cuda)


def cpu_report(**more):
    readings = [
        reading("load", 3.0, 420),
        reading("encode prompt", 0.5, 480),
        reading("denoise", 31.0, 860),
        reading("denoise", 29.0, 850),
        reading("decode", 9.0, 905),
    ]
    flows = {"denoise": Flow(9_000 * MB, 1.8)}
    return run_report(plans.on_cpu(), readings, flows, **more)


def shown(table, width=120):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_a_stage_is_set_beside_its_plan():
    report = cpu_report()
    assert [stage.name for stage in report.stages] == ["encode prompt", "denoise", "decode"]
    denoise = report.stages[1]
    assert (denoise.times, denoise.seconds, denoise.predicted_seconds) == (2, 60.0, 58.0)
    assert (denoise.peak, denoise.predicted_peak) == (860 * MB, 875 * MB)
    assert denoise.peak_difference == pytest.approx(-15 / 875)
    assert (denoise.bound, denoise.bound_seconds) == ("compute", 54.0)
    assert denoise.ratio_to_bound == pytest.approx(60 / 54)
    assert (denoise.moved, denoise.stalled_share) == (9_000 * MB, pytest.approx(0.03))
    assert report.stages[2].moved == 0
    assert (report.peak, report.seconds) == (905 * MB, 69.5)


def test_the_table_and_the_text_say_the_same():
    report = cpu_report(degradations=["decode: memory ran out; went on by rows"])
    text = str(report)
    assert "denoise ×2" in text
    for said in ("60.00", "58.00", "1.11x compute", "3%", "0.86", "0.88", "9.00"):
        assert said in text
    assert "within the budget of 1.00 GB" in text
    assert text.endswith("Not as planned: decode: memory ran out; went on by rows")


def test_nothing_is_cut_at_80_columns():
    lines = shown(cpu_report().table(), width=80)
    assert "…" not in lines
    assert all(said in lines for said in ("encode prompt", "1.11x compute", "peak, GB", "moved"))


def test_the_report_is_json():
    content = json.loads(json.dumps(cpu_report(degradations=["x"]).to_dict()))
    assert content["within_budget"] is True
    assert content["stages"][1]["ratio_to_bound"] == pytest.approx(60 / 54)
    assert content["degradations"] == ["x"]


def test_a_budget_that_was_not_kept_is_said_to_be():
    report = run_report(plans.on_cpu(), [reading("denoise", 30.0, 1_004)])
    assert report.within_budget is False
    assert report.degradations == (
        "denoise: its peak of 1.00 GB is above the budget of 1.00 GB; predicted were 0.88 GB",
    )
    assert "above the budget" in str(report)


def test_a_bound_that_was_beaten_is_said_to_come_from_wrong_rates():
    assert "rates are too low" not in str(cpu_report())
    beaten = str(run_report(plans.on_cpu(), [reading("denoise", 18.0, 860)]))
    assert "Faster than the bound in denoise: the plan's rates are too low" in beaten


def test_on_a_gpu_what_pytorch_allocates_is_compared_and_its_context_counts():
    plan = plans.on_gpu()
    readings = [reading("decode", 3.0, 3_000, cuda=plan.stages[2].allocated)]
    report = run_report(plan, readings)
    assert report.stages[0].peak_difference == 0.0
    assert report.unseen == 420 * MB
    assert report.within_budget
    assert "0.42 GB of the process's own" in str(report)
    assert not run_report(plan, [reading("decode", 3.0, 3_000, cuda=5_600 * MB)]).within_budget


def test_a_run_that_was_not_measured_has_an_empty_table():
    report = run_report(plans.on_cpu(), [])
    assert (report.stages, report.peak, report.within_budget) == ((), None, None)
    assert "stage" in shown(report.table())


def test_flows_are_summed_by_stage_and_inner_stages_count():
    ledger = Ledger()
    flows = FlowMeter(lambda: total_flow([ledger]))
    stages = Stages([flows])
    ledger.loaded("before", 7)
    for _ in range(2):
        with stages.stage("denoise"):
            ledger.loaded("a", 10)
            with stages.stage("unet"):
                ledger.loaded("b", 5)
                ledger.waited("b", 5, 0.5)
    assert flows.report() == {"unet": Flow(10, 1.0), "denoise": Flow(30, 1.0)}


def test_books_that_were_begun_anew_in_between_count_from_nothing():
    assert Flow(5, 1.0).since(Flow(100, 3.0)) == Flow(5, 1.0)


def test_samples_are_thinned_without_losing_a_peak():
    samples = Samples(most=10)
    for index in range(1000):
        samples.add(Peaks(rss=5000 if index == 333 else index, anonymous=index, file=0))
    kept = samples.kept()
    assert len(kept) <= 10
    assert max(sample.rss for sample in kept) == 5000
    assert max(sample.anonymous for sample in kept) == 999
    assert [one.seconds for one in kept] == sorted(one.seconds for one in kept)


def test_the_meter_keeps_a_timeline_if_asked():
    meter = Meter(interval=0.002, timeline=True)
    stages = Stages([meter])
    with stages.stage("denoise"), stages.stage("unet"):
        threading.Event().wait(0.05)
    with stages.stage("decode"):
        pass
    timeline = meter.timeline()
    assert [(mark.name, mark.depth) for mark in timeline.stages] == [("denoise", 0), ("unet", 1), ("decode", 0)]
    denoise, _, decode = timeline.stages
    inside = [sample for sample in timeline.samples if denoise.start <= sample.seconds <= denoise.end]
    assert len(inside) > 5
    assert 0 <= denoise.start < denoise.end <= decode.start
    assert all(sample.rss > MB for sample in inside)
    assert not timeline.has_device
    with pytest.raises(ValueError, match="timeline=True"):
        Meter().timeline()


def a_timeline(*, cuda=None):
    marks = [("load", 0, 3), ("encode prompt", 3, 3.3), ("denoise", 3.3, 33), ("decode", 33, 42), ("write", 42, 42.1)]
    stages = tuple(StageMark(name, 0, start, end, 900 * MB, cuda) for name, start, end in marks)
    samples = tuple(Sample(at / 10, 800 * MB, 500 * MB, 300 * MB, cuda) for at in range(421))
    return Timeline(samples, stages)


@pytest.mark.parametrize("make", [plans.on_cpu, plans.on_gpu, lambda: None])
def test_the_timeline_is_drawn(tmp_path, make):
    plan = make()
    on_gpu = plan is not None and plan.device == "cuda"
    path = plot_timeline(a_timeline(cuda=5 * plans.GB if on_gpu else None), plan, tmp_path / "timeline.png")
    with Image.open(path) as picture:
        assert picture.width > 1500


def test_names_in_a_picture_touch_no_other_and_stay_inside(tmp_path, monkeypatch):
    from lowtide.bench import timeline_plot

    kept = SimpleNamespace()
    monkeypatch.setattr(timeline_plot, "save", lambda figure, path: setattr(kept, "figure", figure) or path)
    plot_timeline(a_timeline(), plans.on_cpu(), tmp_path / "timeline.png")
    (axes,) = kept.figure.axes
    kept.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    assert len(boxes) == 5
    for index, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        assert box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_the_parts_of_a_stage_add_up_to_its_peak(tmp_path):
    for plan in (plans.on_cpu(), plans.on_gpu()):
        assert all(sum(parts_of(stage).values()) == stage.peak for stage in plan.stages)
    assert plot_plan(plans.on_cpu(), plans.curve(plans.on_cpu()), tmp_path / "plan.png").stat().st_size > 10_000


def test_plans_in_a_few_words():
    assert in_words(plans.on_cpu()) == "all weights by blocks from disk; decode row by row"
    words = in_words(plans.on_gpu())
    assert "text_encoder and vae whole from host memory" in words
    assert "unet by blocks from host memory, 0.90 GB stay" in words
    assert words.endswith("decode one picture at a time")
    assert in_words(plans.resident(plans.on_cpu())) == "all weights resident"
    assert "unet by blocks from disk in int8" in in_words(plans.lossy(plans.on_cpu()))
    assert asked_in_words(plans.on_gpu()) == "4 × 1024x1024, 30 steps"
    made_for = {"num_images_per_prompt": 4, "height": 1024, "width": 1024, "num_inference_steps": 30, "eta": 0.0}
    assert asked_in_words(replace(plans.on_gpu(), made_for=made_for)) == "4 × 1024x1024, 30 steps"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.417, "0.42 s"), (17.3, "17.3 s"), (59.96, "1 min 00 s"), (250.2, "4 min 10 s"), (7500, "2 h 05 min")],
)
def test_times_in_words(seconds, said):
    assert seconds_in_words(seconds) == said
