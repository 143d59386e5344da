"""Run Lowtide and diffusers in turn on the same checkpoint, each run in a fresh process, and compare them.

    python benchmarks/compare.py [--pairs 5] [--variant bf16] [--model runs/sd15]

One warm-up pair is not counted. The table gives medians, the ratio of the medians, and the median of the ratios of
pairs, which changes little when the machine's speed drifts. Writes JSON and markdown to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowtide.machine.host import processor_name_and_flags

HERE = Path(__file__).parent
LIBRARIES = ("lowtide", "diffusers")
ROWS = {
    "load": "load, s",
    "denoise": "denoise, s",
    "decode": "decode, s",
    "total": "total, s",
    "peak_rss": "peak RSS, GB",
}
START_UPS = {"import lowtide, s": ["-c", "import lowtide"], "lowtide --help, s": ["-m", "lowtide", "--help"]}


def main() -> None:
    options = parse()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in LIBRARIES}
    for pair in range(options.pairs + 1):
        for library in LIBRARIES:
            result = one_run(library, options)
            print(f"pair {pair} {library}: denoise {result['denoise']:.1f} s", flush=True)
            if pair > 0:
                runs[library].append(result)
    start_ups = {name: seconds_of(arguments) for name, arguments in START_UPS.items()}
    text = table(runs, start_ups)
    print(text)
    write(text, runs, start_ups, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--variant", default=None)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", type=Path, default=Path("runs/sd15"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def one_run(library: str, options: argparse.Namespace, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """One run in a fresh process, with `options` and the arguments `more`."""
    command = [sys.executable, "-W", "ignore", str(HERE / "generate_sd15.py"), "--library", library]
    for name in ("dtype", "size", "steps", "model", "variant", *more):
        value = getattr(options, name)
        if value is True:
            command.append(f"--{name}")
        elif value is not None and value is not False:
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def seconds_of(arguments: list[str], count: int = 7) -> list[float]:
    """Wall seconds of a Python process, the bare interpreter's start included."""
    found = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        found.append(time.perf_counter() - began)
    return found


def table(runs: dict[str, list[dict[str, Any]]], start_ups: dict[str, list[float]]) -> str:
    lines = ["| | lowtide | diffusers | ratio of medians | median ratio of pairs |", "|---|---|---|---|---|"]
    for key, title in ROWS.items():
        scale = 1e9 if key == "peak_rss" else 1
        ours, theirs = ([run[key] / scale for run in runs[library]] for library in LIBRARIES)
        pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ours) / statistics.median(theirs)
        lines.append(f"| {title} | {spread(ours)} | {spread(theirs)} | {ratio:.2f} | {statistics.median(pairs):.2f} |")
    lines += [f"| {title} | {spread(values)} | | | |" for title, values in start_ups.items()]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write(
    text: str, runs: dict[str, list[dict[str, Any]]], start_ups: dict[str, list[float]], options: argparse.Namespace
) -> None:
    name = f"sd15-{options.size}-{options.dtype}" + (f"-{options.variant}" if options.variant else "")
    about = describe_machine("benchmarks/compare.py", runs["lowtide"][0])
    options.out.mkdir(parents=True, exist_ok=True)
    content = {**about, "runs": runs, "start_ups": start_ups}
    (options.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    notes = [f"- {key}: {value}" for key, value in about.items()]
    title = f"# Stable Diffusion 1.5 shapes, {options.size}x{options.size}, {options.steps} steps, {options.dtype}"
    count = len(runs["lowtide"])
    head = f"Median (min to max) of {count} runs of each library, in turn, each run in a fresh process."
    (options.out / f"{name}.md").write_text("\n".join([title, "", head, "", text, "", *notes, ""]))


def describe_machine(script: str, run: dict[str, Any]) -> dict[str, Any]:
    """The command, the machine and the versions that made a result."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    return {
        "command": "python " + " ".join([script, *sys.argv[1:]]),
        "machine": f"{processor_name_and_flags()[0]}, {os.cpu_count()} cores, no GPU",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": commit.stdout.strip(),
        "versions": run["versions"],
    }


def machine_in_words() -> str:
    """The command, the machine and the versions in one line."""
    import torch

    from lowtide import __version__

    about = describe_machine(str(Path(sys.argv[0])), {"versions": f"lowtide {__version__}, torch {torch.__version__}"})
    return f"`{about['command']}`; {about['machine']}; {about['versions']}; commit {about['commit']}."


if __name__ == "__main__":
    main()
