"""Predict the peak of tensor memory of many calls, measure it, and write a table of both.

    python benchmarks/predictions.py [--quick] [--out benchmarks/results/predictions.md]

The cases are those of tests/prediction/prediction_cases.py, with shipped and random weights, on the CPU, in one thread.
The measured figure is the peak of PyTorch's allocations, from the profiler's events. It does not include weights, which
under an offload are mapped pages of a file. `--quick` leaves out the shapes of Stable Diffusion 1.5.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import lowtide
from lowtide.bench.machine import this_machine

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.prediction.prediction_cases import Case, large_cases, quick_cases

OUT = Path(__file__).parent / "results" / "predictions.md"


@dataclass(frozen=True)
class Row:
    case: Case
    predicted: int
    measured: int
    seconds: float

    @property
    def difference(self) -> float:
        """Predicted bytes less measured bytes, as a share of the measured ones."""
        return self.predicted / self.measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="leave out the large ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [*quick_cases(), *([] if options.quick else large_cases())]
    rows = []
    for case in cases:
        rows.append(run(case))
        print(line(rows[-1]), flush=True)
        options.out.write_text(table(rows), encoding="utf-8")


def run(case: Case) -> Row:
    """Predict, then measure."""
    began = time.perf_counter()
    predicted = case.predicted().peak
    seconds = time.perf_counter() - began
    return Row(case, predicted, case.measured(), seconds)


def line(row: Row) -> str:
    case = row.case
    cells = (
        case.name,
        case.dtype,
        case.level or "resident",
        f"{row.predicted:,}",
        f"{row.measured:,}",
        f"{row.difference:+.3%}",
        f"{row.seconds:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[Row]) -> str:
    rows = list(rows)
    exact = sum(row.predicted == row.measured for row in rows)
    worst = [pick(row.difference for row in rows) for pick in (min, max)]
    return "\n".join(
        [
            "# Predicted and measured peaks",
            "",
            f"{len(rows)} calls, {exact} of them predicted to the byte; differences from {worst[0]:+.3%} to "
            f"{worst[1]:+.3%}.",
            f"{this_machine().processor}; one thread; PyTorch {torch.__version__}, Lowtide {lowtide.__version__}.",
            "Peaks of PyTorch's allocations in bytes, without weights. `python benchmarks/predictions.py`",
            "",
            "| call | dtype | weights | predicted | measured | difference | predicted in s |",
            "|:--|:--|:--|--:|--:|--:|--:|",
            *map(line, rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
