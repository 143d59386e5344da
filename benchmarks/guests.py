"""Models of others at their true shapes within small budgets, beside the peer's best plan that needs no GPU.

    python benchmarks/guests.py [sdxl z-image flux wan] [--peer]

Each run is a fresh process. Its peak is sampled from outside every 2 ms; where this may make a memory group of the
system (a cgroup), the budget is also the limit of the group. The peer (`--peer`) is diffusers with
`enable_group_offload` of leaves to disk, which has no budget: its peak is what it takes. The checkpoints are written
first, see make_guests.py. Writes JSON and markdown to `benchmarks/results/`. Linux only, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from budgets import line_of, printed_by
from compare import HERE, machine_in_words
from make_guests import MODELS, write
from outside import memory_group, run_watched

RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "sdxl": (2 * 10**9, {"height": 512, "width": 512, "num_inference_steps": 2}),
    "z-image": (3 * 10**9, {"height": 256, "width": 256, "num_inference_steps": 1}),
    "flux": (3 * 10**9, {"height": 512, "width": 512, "num_inference_steps": 1}),
    "wan": (3 * 10**9, {"height": 240, "width": 416, "num_frames": 9, "num_inference_steps": 1}),
}
PROMPT = "a red boat on the sea at night"


def child(library: str, folder: str, budget: int, call: dict[str, Any], limit: str) -> dict[str, Any]:
    """One process: load, and call once."""
    import torch

    warnings.simplefilter("ignore")
    call = {**call, "prompt": PROMPT, "output_type": "np"}
    began = time.perf_counter()
    if library == "lowtide":
        if limit:
            Path(limit).write_text(str(budget), encoding="ascii")
        pipe, about = within_budget(folder, budget, call)
    else:
        pipe, about = of_the_peer(folder)
    loaded = time.perf_counter()
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**call, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - loaded
    picture = made.images if hasattr(made, "images") else made.frames
    mean = float(picture.astype("float64").mean())
    return {"load": loaded - began, "call": seconds, "mean": mean, **about(pipe)}


def within_budget(folder: str, budget: int, call: dict[str, Any]) -> Any:
    """The pipeline within a budget, and what its plan says of it."""
    import lowtide

    def about(pipe: Any) -> dict[str, Any]:
        plan, report = lowtide.plan_of(pipe), lowtide.report(pipe)
        assert plan is not None
        return {"predicted": plan.peak, "predicted_seconds": plan.seconds, "exactness": plan.exactness,
            "marked": report.peak}  # fmt: skip

    return lowtide.load(folder, ram=budget, native=False, **call), about


def of_the_peer(folder: str) -> Any:
    """The pipeline as diffusers offloads it to disk, and nothing more to say of it."""
    import diffusers
    import torch

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    scratch = tempfile.mkdtemp(dir="runs")
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level",
        offload_to_disk_path=scratch,
    )  # fmt: skip
    return pipe, lambda pipe: {}


def one_run(name: str, library: str) -> dict[str, Any]:
    """One row."""
    import shutil

    folder, (budget, call) = write(name), RUNS[name]
    given = {"library": library, "folder": str(folder), "budget": budget, "call": call}
    with memory_group() as limit:
        asked = {**given, "limit": str(limit or "")}
        done, sampled = run_watched([sys.executable, __file__, "--child", json.dumps(asked)], limit)
    for left in Path("runs").glob("tmp*"):
        shutil.rmtree(left)
    row = printed_by(done, given)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    return {"model": name, "library": library, "budget": budget, "files": size, **call, **row, "measured": sampled}


HEADINGS = (
    "model",
    "files, GB",
    "call",
    "library",
    "budget, GB",
    "predicted",
    "measured",
    "load, s",
    "call, s",
    "result",
)


def cells(row: dict[str, Any]) -> list[str]:
    asked = f"{row['width']}x{row['height']}" + (f"x{row['num_frames']}" if "num_frames" in row else "")
    within = row["library"] == "lowtide"
    return [
        row["model"], f"{row['files'] / 1e9:.1f}", f"{asked}, {row['num_inference_steps']} steps", row["library"],
        f"{row['budget'] / 1e9:.2f}" if within else "none", f"{row['predicted'] / 1e9:.2f}" if within else "",
        f"{row['measured'] / 1e9:.2f}", f"{row['load']:.1f}", f"{row['call']:.1f}", row.get("exactness", ""),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(**json.loads(options.child))))
        return
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for library in ("lowtide", *(["diffusers"] if options.peer else [])):
            rows.append(one_run(name, library))
            print(line_of(cells(rows[-1])), flush=True)
    held = sum(row["measured"] <= row["budget"] for row in rows if row["library"] == "lowtide")
    head = [line_of(HEADINGS), line_of(["---"] * len(HEADINGS))]
    told = f"Whole processes, one at a time, weights of random numbers in bfloat16. {machine_in_words()}"
    title = f"# Models of others at their true shapes: {held} of {len(options.models)} within the budget"
    text = "\n".join([title, "", told, "", *head, *(line_of(cells(row)) for row in rows), ""])
    (HERE / "results" / "guests.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "guests.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
