"""Lowtide on an accelerator: steps beside their physical bound, budgets kept, peers, decodes, in one run.

    python benchmarks/gpu.py [--minutes 7] [--out out/gpu] [--device cuda:0] [--only REGEX] [--dry]

Rows run in order of importance, each in a process of its own with a time limit; those for which no time is left are
named. After every row `gpu.json` and `gpu.md` are written anew; plots come last, where matplotlib is installed.
`bound` is the longer of computing alone (all weights on the device) and the bytes that are streamed by the link's rate,
both measured in the same run. Seconds are medians by the device's events, sizes bytes. Needs PyTorch, numpy and psutil;
what else is missing leaves rows out, which is said. `--dry` runs all of it on the stand-in for an accelerator of the
tests, with tiny networks: its numbers mean nothing. `--report FOLDER` writes tables and plots of a run once more.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a device must not begin CUDA in this process

import argparse
import hashlib
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("torch", "numpy", "psutil", "safetensors", "transformers", "tokenizers", "sentencepiece", "diffusers",
    "accelerate", "cache-dit", "diffusers-mm", "matplotlib", "av", "typer")  # fmt: skip
REQUIRED = ("torch", "numpy", "psutil")
FOR_DRY = ("pytest", "rich", "safetensors", "transformers", "tokenizers", "sentencepiece", "PIL")
"""What the stand-in, and the tests that it belongs to, need too."""


def main() -> int:
    options = parse()
    sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent)]  # this tree's library and tests, whatever is installed
    if options.report is not None:
        content = json.loads((options.report / "gpu.json").read_text(encoding="utf-8"))
        write_report(options.report, content)
        return 0
    needed = (*REQUIRED, *(FOR_DRY if options.dry else ()))
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        print(f"gpu: {', '.join(absent)} must be installed; nothing was measured.", file=sys.stderr)
        return 2
    return measure(options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--device", help="cuda:0 where nothing is said")
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--report", type=Path, metavar="FOLDER")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> int:
    """All rows, or as many as there is time for; the status with which this process ends."""
    import gpu_rows

    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu.log"
    log.write_text("")
    deadline = time.monotonic() + 60 * options.minutes
    device = options.device or ("sim:1" if options.dry else "cuda:0")
    chosen = [row for row in gpu_rows.rows() if re.search(options.only, row.name)]
    content: dict[str, Any] = {"about": about(options, device), "rows": [], "skipped": {}}

    def run(row: gpu_rows.Row, limit: float, method: str) -> dict[str, Any]:
        with log.open("a") as file:
            print(f"\n==== {row.name}", file=file)
        done = gpu_rows.run(row, device, limit, log, tiny=options.dry, method=method)
        told = done.get("error") or "done"
        print(f"gpu: {row.name}: {told} ({done['seconds']:.1f} s)", flush=True)
        return done

    method = "fork" if hasattr(os, "fork") else "spawn"
    if method == "fork":
        gpu_rows.preload(tiny=options.dry)
    first = gpu_rows.Row("machine", "machine", 0, 20, gpu_rows.machine)
    found = run(first, 90, method)
    if method == "fork" and "error" in found and "forked" in found["error"]:
        method, found = "spawn", run(first, 90, "spawn")
    if "error" in found:
        print(f"gpu: {device} cannot be used, so nothing was measured: {found['error']}", file=sys.stderr)
        return 1
    content["about"] |= {"device": found["result"], "processes": method}
    for row in chosen:
        left = deadline - time.monotonic()
        if row.missing:
            content["skipped"][row.name] = f"not installed: {', '.join(row.missing)}"
        elif left < row.expected and not options.dry:
            content["skipped"][row.name] = "no time left"
        else:
            done = run(row, row.limit if options.dry else min(row.limit, max(left, 1)), method)
            content["rows"].append({"group": row.group, "name": row.name, **done})
        save(options.out, content)
    write_report(options.out, content)
    print(f"gpu: {options.out}/gpu.json, gpu.md and plots", flush=True)
    return int(any("error" in row for row in content["rows"]))


def save(folder: Path, content: dict[str, Any]) -> None:
    """Write what there is so far, so that a run that is stopped leaves it."""
    from gpu_report import report

    for name, text in (("gpu.json", json.dumps(content, indent=1)), ("gpu.md", report(content))):
        unfinished = folder / f"{name}.new"
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(folder / name)


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Tables, and plots where matplotlib is installed."""
    save(folder, content)
    if importlib.util.find_spec("matplotlib") is None:
        print("gpu: matplotlib is not installed, so there are no plots.", flush=True)
        return
    from gpu_plots import plots

    plots(content, folder)


def about(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """What a reader must know beside the numbers."""
    import torch

    from lowtide.machine.host import host_memory, processor_name_and_flags, usable_cpus

    return {
        "command": "python " + " ".join(sys.argv),
        "minutes": options.minutes,
        "dry": options.dry,
        "asked_for": device,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "source": source_hash(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": {name: found for name in PACKAGES if (found := installed(name)) is not None},
        "not_installed": [name for name in PACKAGES if installed(name) is None],
        "processor": processor_name_and_flags()[0],
        "cpus": usable_cpus(),
        "host_memory": host_memory().total,
    }


def installed(name: str) -> str | None:
    """The version of a package, where it can be imported."""
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """The commit of this checkout; None in a copy that has no git."""
    asked = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def source_hash() -> str:
    """A hash over the library's code, by which a copy without git is told."""
    digest = hashlib.sha256()
    for file in sorted((HERE.parent / "src").rglob("*.py")):
        digest.update(file.relative_to(HERE.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
