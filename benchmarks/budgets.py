"""Do budgets hold, and are predictions right? Three models, three sizes, five budgets, each in a fresh process.

    python benchmarks/budgets.py [--models seascapes sd15 clips] [--steps 3]

The smallest budget is 3 % less than any plan takes and must be refused; under the largest, all weights are resident.
Each process loads its model within the budget and makes the same thing twice. Its peak is what it took at most as a
whole, interpreter and libraries included: the larger one of the kernel's high-water marks and of samples of its
resident memory, taken every 2 ms from outside. Where this may make a memory group of the system (a cgroup), the budget
is also the limit of the group, in which the process is killed rather than given more. Seconds are those of the second
run. They are predicted by rates that are measured anew for each size. Writes JSON and markdown to
`benchmarks/results/`. `sd15` needs `runs/sd15` (see make_sd15.py). Linux only, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import HERE, machine_in_words
from outside import memory_group, run_watched

SHARES = (-0.03, 0.0, 0.1, 0.4, 1.0)
SIZES: dict[str, list[dict[str, int]]] = {
    "seascapes": [{"height": side, "width": side} for side in (128, 256, 512)],
    "sd15": [{"height": side, "width": side} for side in (256, 384, 512)],
    "clips": [{"height": h, "width": w, "frames": f} for h, w, f in ((96, 128, 17), (192, 256, 17), (240, 352, 9))],
}


def child(model: str, folder: str, size: dict[str, int], share: float, steps: int, limit: str) -> dict[str, Any]:
    """One process: compute the budget from `share`, then load and run within it; `limit` is the file of its group."""
    import time

    import torch

    import lowtide
    from lowtide.fitting.budgets import parse_budgets
    from lowtide.measuring.peaks import process_peak
    from lowtide.pipelines.base import DiffusionPipeline
    from lowtide.pipelines.load import prepare_checkpoint
    from lowtide.planning.machine_rates import machine_rates
    from lowtide.planning.planner import Planner

    dtype, variant = form_of(model)
    asked = {**size, "steps": steps}
    cpu = torch.device("cpu")
    machine_rates(cpu, dtype, refresh=share == SHARES[0])  # what else goes on here changes within minutes
    fit = prepare_checkpoint(folder, parse_budgets(cpu), device=cpu, dtype=dtype, variant=variant, **asked)
    curve = Planner(fit.workload, fit.rates).curve(fit.budgets)
    least, most = curve[0][0], curve[-1][0]
    budget = int(least + share * ((most - least) if share > 0 else least))
    result: dict[str, Any] = {"model": model, **size, "budget": budget, "least": least}
    if limit:
        Path(limit).write_text(str(budget), encoding="ascii")
    try:
        options: dict[str, Any] = {"ram": budget, "offload_device": "cpu", "size": asked}
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, variant=variant, **options)
    except lowtide.BudgetError as error:
        return {**result, "refused": str(error), "minimum": error.minimum.ram, "measured": process_peak()}
    pipe.set_progress_bar_config(disable=True)
    peaks = [process_peak() or 0]
    for _ in range(2):
        began = time.perf_counter()
        pipe("a boat on the sea", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call(size))
        seconds = time.perf_counter() - began
        peaks += [pipe.report().peak or 0, process_peak() or 0]  # the report's meter begins the kernel's mark anew
    plan = pipe.plan
    result |= {"predicted": plan.peak, "exactness": plan.exactness, "predicted_seconds": plan.seconds}
    stages = {
        stage.name: [stage.predicted_peak, stage.peak, stage.predicted_seconds, stage.seconds]
        for stage in pipe.report().stages
    }
    return {**result, "measured": max(peaks), "seconds": seconds, "stages": stages}


def form_of(model: str) -> tuple[Any, str | None]:
    """The dtype that a model runs in, and the variant of its files."""
    import torch

    return (torch.bfloat16, "bf16") if model == "sd15" else (torch.float32, None)


def call(size: dict[str, int]) -> dict[str, int]:
    """The size as the arguments of a pipeline's call."""
    return {"num_frames" if name == "frames" else name: value for name, value in size.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(**json.loads(options.child))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            folder = checkpoint(model, Path(scratch))
            for size in SIZES[model]:
                for share in SHARES:
                    given = {"model": model, "folder": str(folder), "size": size, "share": share}
                    rows.append(watched_process(**given, steps=options.steps))
                    print(line(rows[-1]), flush=True)
    write(rows, options.steps)


def checkpoint(model: str, scratch: Path) -> Path:
    """The folder of a model. The small video model is written to `scratch`."""
    root = HERE.parent
    if model == "clips":
        subprocess.run(
            [sys.executable, str(root / "examples" / "make_tiny_video_model.py"), scratch / "clips"], check=True
        )
        return scratch / "clips"
    return root / "runs" / "sd15" if model == "sd15" else root / "src" / "lowtide" / "assets" / "seascapes"


def one_process(script: str, **given: Any) -> Any:
    """Run a benchmark's child in a process of its own and read the JSON in its last line."""
    command = [sys.executable, script, "--child", json.dumps(given)]
    return printed_by(subprocess.run(command, capture_output=True, text=True, check=False), given)


def watched_process(**given: Any) -> dict[str, Any]:
    """Run a child in a memory group, where one can be made, and watch its resident memory from outside."""
    with memory_group() as limit:
        asked = {**given, "limit": str(limit or "")}
        done, sampled = run_watched([sys.executable, __file__, "--child", json.dumps(asked)], limit)
    row = printed_by(done, given)
    return {**row, "marked": row["measured"], "measured": max(row["measured"], sampled), "limited": limit is not None}


def printed_by(done: subprocess.CompletedProcess[str], given: dict[str, Any]) -> Any:
    """The JSON in the last line that a process printed; exits where it failed."""
    if done.returncode != 0:
        raise SystemExit(f"{given}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


HEADINGS = ("model", "size", "budget", "predicted", "measured", "predicted / measured", "result", "s", "predicted / s")


def size_in_words(size: dict[str, Any]) -> str:
    """Such as "352x240x9"."""
    return f"{size['width']}x{size['height']}" + (f"x{size['frames']}" if "frames" in size else "")


def cells(row: dict[str, Any]) -> list[str]:
    first = [row["model"], size_in_words(row), f"{row['budget'] / 1e6:.0f}"]
    if "refused" in row:
        return [*first, f"refused, least {row['minimum'] / 1e6:.0f}", f"{row['measured'] / 1e6:.0f}", "", "", "", ""]
    ratio, pace = row["predicted"] / row["measured"], row["predicted_seconds"] / row["seconds"]
    sizes = [f"{row['predicted'] / 1e6:.0f}", f"{row['measured'] / 1e6:.0f}", f"{ratio:.3f}"]
    return [*first, *sizes, row["exactness"], f"{row['seconds']:.1f}", f"{pace:.2f}"]


def line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(cells(row)) + " |"


def write(rows: list[dict[str, Any]], steps: int) -> None:
    ran = [row for row in rows if "refused" not in row]
    held = sum(row["measured"] <= row["budget"] for row in ran)
    limited = " Each process ran in a memory group that the system held to the budget." if ran[0]["limited"] else ""
    ratios = [row["predicted"] / row["measured"] for row in ran]
    head = [line_of(HEADINGS), line_of(["---"] * len(HEADINGS))]
    text = "\n".join(
        [
            f"# Budgets: {held} of {len(ran)} held, {len(rows) - len(ran)} refused beforehand",
            "",
            f"Resident memory of the whole process in MB, on a CPU, {steps} steps. Predicted peaks are "
            f"{min(ratios):.3f} to {max(ratios):.3f} times the measured ones.{limited} Times are read in `pace.md`: "
            f"here other work may go on beside the runs. {machine_in_words()}",
            "",
            *head,
            *map(line, rows),
            "",
        ]
    )
    (HERE / "results" / "budgets.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "budgets.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(text)


def line_of(texts: Any) -> str:
    return "| " + " | ".join(texts) + " |"


if __name__ == "__main__":
    main()
