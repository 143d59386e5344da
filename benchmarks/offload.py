"""Run every offload of Lowtide and of diffusers in turn on the same checkpoint, each run in a fresh process.

    python benchmarks/offload.py [--rounds 3] [--dtype bfloat16] [--variant bf16] [--cold] [--rows lowtide:block ...]

A row is a library and one of its plans (see generate_sd15.py). One warm-up round is not counted. Each time is compared
with Lowtide's resident run of the same round, so that changes of the machine's speed cancel out. Writes JSON and
markdown to `benchmarks/results/`. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from compare import HERE, describe_machine, one_run, spread
from generate_sd15 import PLANS

REFERENCE = "lowtide:resident"


def main() -> None:
    options = parse()
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
    for number in range(options.rounds + 1):
        for row in options.rows:
            library, options.plan = row.split(":")
            result = one_run(library, options, ("plan", "cold"))
            print(
                f"round {number} {row}: denoise {result['denoise']:.1f} s, {result['peak_rss'] / 1e9:.2f} GB",
                flush=True,
            )
            if number > 0:
                runs[row].append(result)
    text = table(runs)
    print(text)
    write(text, runs, options)


def parse() -> argparse.Namespace:
    every = [f"{library}:{plan}" for library, plans in PLANS.items() for plan in plans]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=every, default=every)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variant", default=None)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    parser.add_argument("--model", type=Path, default=Path("runs/sd15"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if REFERENCE not in options.rows:
        parser.error(f"--rows needs {REFERENCE}, with which the others are compared")
    return options


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| | peak RSS, GB | denoise, s | of resident | whole run, s | weights: peak ≤ bound, MB | moved, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, results in runs.items():
        pairs = [one["denoise"] / other["denoise"] for one, other in zip(results, runs[REFERENCE], strict=True)]
        peak = spread([one["peak_rss"] / 1e9 for one in results])
        times = [spread([one[key] for one in results]) for key in ("denoise", "total")]
        weights = moved = ""
        if "weights_peak" in results[0]:
            weights = f"{results[0]['weights_peak'] / 1e6:.0f} ≤ {results[0]['weights_bound'] / 1e6:.0f}"
            moved = f"{results[0]['moved'] / 1e9:.1f}"
        ratio = f"{statistics.median(pairs):.2f}x"
        lines.append(f"| {row} | {peak} | {times[0]} | {ratio} | {times[1]} | {weights} | {moved} |")
    return "\n".join(lines)


def write(text: str, runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    about = describe_machine("benchmarks/offload.py", runs[REFERENCE][0])
    pictures = {row: sorted({one["checksum"] for one in results}) for row, results in runs.items()}
    ours = {one for row, found in pictures.items() if row.startswith("lowtide") for one in found}
    name = f"offload-{options.size}-{options.dtype}" + ("-cold" if options.cold else "")
    options.out.mkdir(parents=True, exist_ok=True)
    content = {**about, "pictures": pictures, "runs": runs}
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    cache = "dropped from the page cache before each run" if options.cold else "in the page cache"
    head = [
        f"# Where weights rest: Stable Diffusion 1.5 shapes, {options.size}x{options.size}, {options.steps} steps, "
        f"{options.dtype}, checkpoint {cache}",
        "",
        f"Median (min to max) of {options.rounds} runs of each row; rows take turns, and each run is a fresh process. "
        "Peak RSS is that of the whole process. `of resident` is the median ratio of the denoising time to that of "
        "Lowtide's resident run in the same round.",
        "",
    ]
    equal = "equal, byte for byte" if len(ours) == 1 else f"NOT EQUAL: {pictures}"
    notes = [f"- pictures of all our plans: {equal}", *(f"- {key}: {value}" for key, value in about.items())]
    (options.out / f"{name}.md").write_text("\n".join([*head, text, "", *notes, ""]))


if __name__ == "__main__":
    sys.exit(main())
