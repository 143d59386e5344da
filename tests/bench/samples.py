"""Options, readings and reports for tests, made without running anything."""

from pathlib import Path

from lowtide.bench.machine import Machine
from lowtide.bench.runs import Job, Options, Reading, Run
from lowtide.bench.table_report import Report

MACHINE = Machine("A Processor", 2.0, 2**34, "Linux")


def options(rows=("original", "half"), **changes):
    given = {
        "model": "owner/name", "variant": None, "device": "cpu", "half": "bfloat16", "width": 32, "height": 16,
        "steps": 1, "batch": 1, "prompt": "sea", "rounds": 1, "peer": None, "seed": 0, "timeout": None, "out": Path(),
    }  # fmt: skip
    return Options(rows=tuple(rows), **{**given, **changes})


def reading(latency=1.0, peak=10**9, checksum="a", **changes):
    given = {
        "load": 0.1, "apply": 0.2, "peak_rss": peak, "device_allocated": None, "device_reserved": None,
        "gpu": None, "versions": {"torch": "2"},
    }  # fmt: skip
    return Reading(latency=latency, checksum=checksum, **{**given, **changes})


def run(technique, found, number=1, library="lowtide"):
    """A run with a reading, or with a reason (a text) why there is none."""
    failed = isinstance(found, str)
    return Run(number, Job(technique, library), None if failed else found, found if failed else None)


def report(*runs, **changes):
    rows = dict.fromkeys(one.job.technique for one in runs)
    return Report(options(rows, **changes), "lowtide bench table", MACHINE, list(runs))
