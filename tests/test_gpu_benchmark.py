"""The benchmark on an accelerator, run dry on the stand-in: rows of every kind, all tables, all plots."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ONE_OF_EACH = ("flux 100", "flux 50", "flux diffusers block", "flux 50, PCIe 3", "L20 lowtide", "call tiny clips 40",
    "fp8 products", "decode 1024")  # fmt: skip
TABLES = ["Steps", "Slower links", "As on an L20", "Calls within budgets", "Decodes", "Products in fp8"]
PLOTS = ("steps", "peers", "another_card", "predictions", "decodes")
DRY = """
import sys
sys.path[:0] = [{benchmarks!r}]
sys.argv = ["gpu.py", "--dry", "--out", "out", "--only", {only!r}]
import gpu
sys.exit(gpu.main())
"""


@pytest.mark.parametrize("rows", ["one of each", pytest.param("all", marks=pytest.mark.slow)])
def test_dry(rows, warm, tmp_path):
    only = f"^({'|'.join(map(re.escape, ONE_OF_EACH))})$" if rows == "one of each" else ""
    warm.run(DRY.format(benchmarks=str(BENCHMARKS), only=only), tmp_path, 3600).check()
    content = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert content["about"]["dry"]
    assert {row["name"]: row["error"] for row in content["rows"] if "error" in row} == {}
    assert {row["name"] for row in content["rows"]} >= set(ONE_OF_EACH)
    assert all(reason.startswith("not installed") for reason in content["skipped"].values())
    page = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert [title for title in re.findall(r"^## (.*)$", page, re.MULTILINE) if title != "Left out"] == TABLES
    if importlib.util.find_spec("matplotlib") is not None:
        assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 1000 for name in PLOTS)


def test_two_decodes_of_one_size_are_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plots = importlib.import_module("gpu_plots")
    taken = [{"side": 32, "whole": {"peak": peak}, "exact": {"peak": peak // 2}} for peak in (10**9, 2 * 10**9)]
    rows = [{"group": "decodes", "name": f"decode {place}", "result": result} for place, result in enumerate(taken)]
    assert plots.decodes({"rows": rows}) is not None


def test_what_is_missing_is_said(warm, tmp_path):
    """In place of a traceback, and nothing is begun."""
    told = "import gpu\ngpu.REQUIRED = ('torch', 'no_such_package')\n"
    source = DRY.format(benchmarks=str(BENCHMARKS), only="").replace("import gpu\n", told)
    result = warm.run(source, tmp_path, 60)
    assert result.status == 2
    assert "no_such_package must be installed" in result.output
    assert not (tmp_path / "out").exists()
