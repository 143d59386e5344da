"""Run Lowtide and diffusers in turns, each time in a fresh process, and write a table of what both took.

    python benchmarks/make_sd15.py --variant bf16
    python benchmarks/compare.py --variant bf16 [--pairs 5] [--dtype bfloat16] [--size 256] [--steps 4]

One pair of runs comes first and is not counted: it brings the files into the page cache. Then A B A B … The results go
to `benchmarks/results/NAME.json` (every run) and `NAME.md` (medians). Leave the machine alone meanwhile. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).parent
OURS, PEER = "lowtide", "diffusers"
LIBRARIES = (OURS, PEER)
STARTUP_RUNS = 7

Run = dict[str, Any]


@dataclass(frozen=True)
class Quantity:
    """A row of the table: the entry of a run, its title with the unit, the factor to that unit, and the digits."""

    key: str
    title: str
    factor: float
    digits: int


QUANTITIES = (
    Quantity("load", "import and load, s", 1, 2),
    Quantity("encode_prompt", "encode the prompt, s", 1, 2),
    Quantity("denoise", "denoise, s", 1, 2),
    Quantity("first_step", "– first step, s", 1, 2),
    Quantity("other_steps", "– other steps, s", 1, 2),
    Quantity("decode", "decode, s", 1, 2),
    Quantity("total", "total, s", 1, 2),
    Quantity("peak_rss", "peak RSS, GB", 1e-9, 3),
    Quantity("peak_anonymous", "peak anonymous, GB", 1e-9, 3),
)


@dataclass(frozen=True)
class Bar:
    """A figure that we hold ourselves to."""

    title: str
    measured: float
    limit: float

    def row(self) -> str:
        return f"| {self.title} | {self.measured:.3f} | ≤ {self.limit:g} | {'yes' if self.is_met else '**no**'} |"

    @property
    def is_met(self) -> bool:
        return self.measured <= self.limit


def main() -> None:
    options = parse()
    machine, command = describe_machine(), shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    startup = {name: [seconds() for _ in range(STARTUP_RUNS)] for name, seconds in STARTUP.items()}
    runs: dict[str, list[Run]] = {library: [] for library in LIBRARIES}
    with tempfile.TemporaryDirectory() as folder:
        for pair, library in turns(options.pairs):
            run = generate(library, options, Path(folder, f"{library}.png"))
            say(f"{'warm-up' if pair == 0 else f'pair {pair}'}, {library}: {summary(run)}")
            if pair > 0:
                runs[library].append(run)
        pixels = pixel_difference(*(Path(folder, f"{library}.png") for library in LIBRARIES))
    versions = runs[OURS][0]["versions"]
    report = {
        "command": command, "machine": machine, "commit": commit(), "date": datetime.now(UTC).date().isoformat(),
        "versions": versions, "settings": settings(options), "largest_pixel_difference": pixels,
        "startup": startup, "runs": runs,
    }  # fmt: skip
    write(report, options.out / (options.name or default_name(options)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="pairs that count")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", help="weight files to take, such as bf16; without it the float32 ones")
    parser.add_argument("--model", type=Path, default=Path("runs/sd15"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", help="of the result files")
    return parser.parse_args()


def default_name(options: argparse.Namespace) -> str:
    return f"sd15-{options.dtype}-{options.size}px-from-{options.variant or 'float32'}"


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("pairs", "dtype", "size", "steps", "threads", "variant")}


def turns(pairs: int) -> Iterator[tuple[int, str]]:
    """The order of the runs; pair 0 is the warm-up."""
    return ((pair, library) for pair in range(pairs + 1) for library in LIBRARIES)


def generate(library: str, options: argparse.Namespace, picture: Path) -> Run:
    """One run of `generate_sd15.py`."""
    arguments = {key: getattr(options, key) for key in ("dtype", "size", "steps", "threads", "variant", "model")}
    arguments |= {"library": library, "picture": picture}
    flags = [text for key, value in arguments.items() if value is not None for text in (f"--{key}", str(value))]
    command = [sys.executable, str(HERE / "generate_sd15.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(run: Run) -> str:
    return f"denoise {run['denoise']:.2f} s, total {run['total']:.2f} s, peak RSS {run['peak_rss'] / 1e9:.3f} GB"


def pixel_difference(first: Path, second: Path) -> int:
    """The largest difference of one channel of one pixel, of 255."""
    pictures = [np.asarray(Image.open(path)).astype(int) for path in (first, second)]
    return int(abs(pictures[0] - pictures[1]).max())


def import_seconds(package: str) -> float:
    """Seconds that `import package` takes in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {package}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def help_seconds() -> float:
    """Seconds of the whole command `lowtide --help`."""
    began = time.perf_counter()
    subprocess.run([str(Path(sys.executable).with_name("lowtide")), "--help"], capture_output=True, check=True)
    return time.perf_counter() - began


STARTUP = {
    "import lowtide": lambda: import_seconds("lowtide"),
    "lowtide --help": help_seconds,
    "import diffusers": lambda: import_seconds("diffusers"),
}


def describe_machine() -> dict[str, Any]:
    """The processor, its cores, the memory, and how busy the machine was before we began."""
    rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit that was measured; a `+` says that the sources had changes."""
    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def write(report: dict[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(report)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, chosen = report["machine"], report["settings"]
    source = f"{chosen['variant']} files" if chosen["variant"] else "float32 files"
    ours, peer = (f"{library} {report['versions'][library]}" for library in LIBRARIES)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name not in LIBRARIES)
    return "\n".join([
        f"# Stable Diffusion 1.5 shapes in {chosen['dtype']}, {chosen['size']}x{chosen['size']}, {chosen['steps']} steps",
        "",
        f"`{report['command']}`",
        "",
        f"Random weights from {source}; DDIM, guidance 7.5, batch 1, {chosen['threads']} threads; {chosen['pairs']} pairs "
        "of runs in turns, each in a fresh process, after one that does not count. Median (smallest–largest).",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_bytes'] / 1e9:.1f} GB RAM, {machine['system']}; load "
        f"average before: {machine['load_average_before']}. {versions}. Commit {report['commit']}, {report['date']}.",
        "",
        f"| | {ours} | {peer} | ratio of medians | median of ratios |",
        "|---|---:|---:|---:|---:|",
        *(row(quantity, report["runs"]) for quantity in QUANTITIES),
        "",
        f"The two pictures differ by at most {report['largest_pixel_difference']} of 255.",
        "",
        "| start-up | median (smallest–largest), s |",
        "|---|---:|",
        *(f"| `{name}` | {spread(seconds, 1, 3)} |" for name, seconds in report["startup"].items()),
        "",
        "| bar | measured | limit | met |",
        "|---|---:|---:|---|",
        *(bar.row() for bar in bars(report)),
        "",
    ])  # fmt: skip


def bars(report: dict[str, Any]) -> list[Bar]:
    """The limits of the start-up for every report; those of memory and speed for the settings that they were set for."""
    runs, startup = report["runs"], report["startup"]
    found = [
        Bar("`import lowtide`, s", median(startup["import lowtide"]), 0.3),
        Bar("`lowtide --help`, s", median(startup["lowtide --help"]), 0.5),
    ]
    if [report["settings"][key] for key in ("dtype", "size", "steps")] == ["bfloat16", 256, 4]:
        found.append(Bar("peak RSS of Lowtide, GB", median_of(runs[OURS], "peak_rss") / 1e9, 2.6))
        ratio = median_of(runs[OURS], "denoise") / median_of(runs[PEER], "denoise")
        found.append(Bar("denoise, ratio to diffusers", ratio, 1.0))
    return found


def row(quantity: Quantity, runs: dict[str, list[Run]]) -> str:
    values = {library: [run[quantity.key] for run in runs[library]] for library in LIBRARIES}
    cells = [spread(values[library], quantity.factor, quantity.digits) for library in LIBRARIES]
    of_medians = median(values[OURS]) / median(values[PEER])
    of_pairs = median(ours / peer for ours, peer in zip(values[OURS], values[PEER], strict=True))
    return f"| {quantity.title} | {cells[0]} | {cells[1]} | {of_medians:.3f} | {of_pairs:.3f} |"


def spread(values: list[float], factor: float, digits: int) -> str:
    low, middle, high = (f"{value * factor:.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} ({low}–{high})"


def median_of(runs: list[Run], key: str) -> float:
    return median(run[key] for run in runs)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
