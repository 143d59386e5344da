"""The cap holds: real limits of the system around a process that knows them, and around one that was told more."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import lowtide
from lowtide.fitting.process import alone

SHIPPED = Path(lowtide.__file__).parent / "assets" / "seascapes"
DRAW = f"""
import json, sys, warnings
import torch, lowtide
from lowtide.machine.host import host_memory
torch.set_num_threads(1)
options, limit = json.loads(sys.argv[1]), int(sys.argv[2])
pipe = lowtide.StableDiffusionPipeline.from_pretrained({str(SHIPPED)!r}, **options)
pipe.set_progress_bar_config(disable=True)

def draw():
    generator = torch.Generator().manual_seed(3)
    return pipe("a boat", height=448, width=448, num_inference_steps=1, generator=generator, output_type="pt").images

said = []
if limit:
    import resource
    draw()  # kernels are compiled, threads have begun
    pages = next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]
    allowed = int(pages) * 1024 + limit
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    picture = draw()
said = [str(one.message) for one in found]
mean = picture.double().mean().item()
print(json.dumps({{"mean": mean, "said": said, "ways": [one.way for one in pipe.plan.stages] if pipe.plan else [],
    "peak": pipe.report().peak if pipe.plan else 0, "total": host_memory().total}}))
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")


def draw(options, limit=0, variables=None, **process):
    command = [sys.executable, "-c", DRAW, json.dumps(options), str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(Path(lowtide.__file__).parent.parent), **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **process)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain():
    """The same picture without limits, in this process."""
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(SHIPPED)
    pipe.set_progress_bar_config(disable=True)
    size, generator = {"height": 448, "width": 448}, torch.Generator().manual_seed(3)
    made = pipe("a boat", **size, num_inference_steps=1, generator=generator, output_type="pt").images
    return {"mean": made.double().mean().item()}


@pytest.fixture(scope="module")
def known():
    """What a process takes by itself is measured."""
    alone(torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_an_allocator_that_gives_no_more_is_worked_around(plain):
    """The whole decode does not fit what the system allows, though the budget said so: rows do."""
    limited = draw({"ram": "2GB"}, limit=100 * 2**20)
    assert any("decode: memory ran out" in one for one in limited["said"])
    assert limited["ways"][-1] != "whole"
    assert limited["mean"] == pytest.approx(plain["mean"], abs=1e-6)


@pytest.fixture
def group():
    """A control group of our own below that of this process, where that can be made."""
    lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    for _, controllers, own in (line.split(":", 2) for line in lines):
        top = Path("/sys/fs/cgroup") / ("memory" if controllers == "memory" else "")
        folder = top / own.lstrip("/") / f"lowtide-{os.getpid()}"
        if controllers not in ("", "memory"):
            continue
        with suppress(OSError):
            folder.mkdir()
            if any((folder / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
                yield folder
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("no control group can be made here")


@pytest.mark.parametrize(
    "is_new", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["rates known", "nothing known"]
)
@pytest.mark.usefixtures("known")  # there is no room to measure in the container
def test_a_container_that_kills_is_never_reached(group, plain, tmp_path, is_new):
    variables = {"XDG_CACHE_HOME": str(tmp_path)} if is_new else {}
    limit = group / ("memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes")
    limit.write_text(str(650 * 10**6), encoding="ascii")
    procs = group / "cgroup.procs"
    made = draw({"ram": "auto"}, variables=variables, preexec_fn=lambda: procs.write_text("0", encoding="ascii"))
    assert made["total"] <= 650 * 10**6
    assert made["peak"] <= 650 * 10**6
    assert made["mean"] == pytest.approx(plain["mean"], abs=1e-6)
