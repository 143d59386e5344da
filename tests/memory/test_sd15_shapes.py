"""The plans at the true shapes of Stable Diffusion 1.5: equal pictures, ledgers under their bounds, processes small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GB = 10**9
MOST_RSS = {
    ("bfloat16", "block"): 1.0 * GB,
    ("bfloat16", "leaf"): 0.8 * GB,
    ("bfloat16", "sequential"): 0.85 * GB,
    ("float32", "block"): 1.3 * GB,
    ("float32", "leaf"): 1.3 * GB,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peaks of the kernel"),
]


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def generate(model: Path, dtype: str, plan: str) -> dict[str, Any]:
    variant = ["--variant", "bf16"] if dtype == "bfloat16" else []
    options = [
        "--library",
        "lowtide",
        "--model",
        str(model),
        "--dtype",
        dtype,
        "--plan",
        plan,
        "--steps",
        "2",
        *variant,
    ]
    return json.loads(script("generate_sd15.py", *options).splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15") / "model"
    script("make_sd15.py", "--out", str(folder))
    script("make_sd15.py", "--out", str(folder), "--variant", "bf16")
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_plan_draws_the_same_picture_in_the_memory_it_says(checkpoint: Path, dtype: str) -> None:
    plain = generate(checkpoint, dtype, "resident")
    for plan in ("block", "leaf", "sequential", "model", "half"):
        found = generate(checkpoint, dtype, plan)
        assert found["checksum"] == plain["checksum"], plan
        assert found["weights_peak"] <= found["weights_bound"], plan
        assert found["peak_rss"] <= MOST_RSS.get((dtype, plan), plain["peak_rss"] * 1.05), plan
    assert plain["peak_rss"] > max(limit for (kind, _), limit in MOST_RSS.items() if kind == dtype), "a control"
