"""Are predicted times right? Runs of three pipelines, with rates measured just before and just after each run.

    python benchmarks/pace.py [--rounds 3]

The speed of a machine that others use too changes by half within minutes, and earlier rates cannot know that. So a run
is compared with the mean of two predictions: by the rates measured before it, and by those measured after it. Each row
is the median of fresh processes. In each process, the second run is the one that counts. Writes markdown to
`benchmarks/results/`. `sd15` needs `runs/sd15` (see make_sd15.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from budgets import call, checkpoint, form_of, one_process, size_in_words
from compare import HERE, machine_in_words

RUNS: list[tuple[str, dict[str, int]]] = [
    ("seascapes", {"height": 128, "width": 128, "steps": 10}),
    ("seascapes", {"height": 256, "width": 256, "steps": 10}),
    ("seascapes", {"height": 512, "width": 512, "steps": 5}),
    ("sd15", {"height": 256, "width": 256, "steps": 5}),
    ("sd15", {"height": 512, "width": 512, "steps": 2}),
    ("clips", {"height": 96, "width": 128, "frames": 17, "steps": 5}),
    ("clips", {"height": 192, "width": 256, "frames": 17, "steps": 5}),
]


def child(model: str, folder: str, size: dict[str, int]) -> list[float]:
    """Seconds of a run: predicted by the rates before it, measured, and predicted by the rates after it."""
    import time

    import torch

    from lowtide.pipelines.base import DiffusionPipeline
    from lowtide.planning.machine_rates import machine_rates
    from lowtide.planning.planner import Planner

    cpu, (dtype, variant) = torch.device("cpu"), form_of(model)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, variant=variant, ram="12GB", size=size)
    pipe.set_progress_bar_config(disable=True)
    fit = pipe.applied.fit

    def predicted() -> float:
        rates = machine_rates(cpu, dtype, refresh=True)
        return Planner(fit.workload, rates).choose(fit.budgets).seconds

    def run() -> float:
        began = time.perf_counter()
        asked = {name: value for name, value in size.items() if name != "steps"}
        pipe("a boat on the sea", num_inference_steps=size["steps"], **call(asked))
        return time.perf_counter() - began

    run()
    return [predicted(), run(), predicted()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(**json.loads(options.child))))
        return
    taken: list[list[list[float]]] = [[] for _ in RUNS]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {model: str(checkpoint(model, Path(scratch))) for model in dict(RUNS)}
        for _ in range(options.rounds):
            for (model, size), found in zip(RUNS, taken, strict=True):
                found.append(one_process(__file__, model=model, folder=folders[model], size=size))
                print(row(model, size, found), flush=True)
    ratios = [ratio(one) for found in taken for one in found]
    within = sum(0.75 <= statistics.median(map(ratio, found)) <= 1.25 for found in taken)
    text = "\n".join(
        [
            f"# Pace: {within} of {len(RUNS)} runs within a quarter of what was predicted",
            "",
            "Predicted over measured seconds of a whole call with resident weights: median "
            f"{statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} "
            "processes. `changed` is the prediction by the rates after the run over that by the rates before it: how "
            f"much the speed of the machine changed meanwhile. {machine_in_words()}",
            "",
            "| run | predicted, s | measured, s | ratio | lowest | highest | changed |",
            "|:--|--:|--:|--:|--:|--:|--:|",
            *(row(model, size, found) for (model, size), found in zip(RUNS, taken, strict=True)),
            "",
        ]
    )
    (HERE / "results" / "pace.md").write_text(text, encoding="utf-8")
    print(text)


def ratio(one: list[float]) -> float:
    """Predicted seconds over measured ones."""
    return (one[0] + one[2]) / 2 / one[1]


def row(model: str, size: dict[str, int], found: list[list[float]]) -> str:
    name = f"{model} {size_in_words(size)}, {size['steps']} steps"
    ratios = sorted(map(ratio, found))
    predicted = statistics.median((one[0] + one[2]) / 2 for one in found)
    measured, changed = statistics.median(one[1] for one in found), statistics.median(one[2] / one[0] for one in found)
    cells = [f"{predicted:.2f}", f"{measured:.2f}", f"{statistics.median(ratios):.2f}"]
    return f"| {name} | {' | '.join(cells)} | {ratios[0]:.2f} | {ratios[-1]:.2f} | {changed:.2f} |"


if __name__ == "__main__":
    main()
