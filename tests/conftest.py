"""Shared by all tests: no network, few threads, and `gpu` tests only where there is a GPU."""

import gc
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# rates of this machine, measured while tests run beside each other, are not for its user
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "lowtide-tests-cache")

import hypothesis
import pytest

hypothesis.settings.register_profile("lowtide", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("lowtide")


def pytest_collection_modifyitems(items):
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_setup(item, begun=[None]):  # noqa: B006
    """What is there when a file of tests begins stays: garbage collections need not look through it again."""
    if begun[0] != item.path:
        begun[0] = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def usual_rates():
    """Plans in tests take the usual rates of a CPU for this machine's, also in processes that tests start."""
    from dataclasses import asdict, replace
    from pathlib import Path

    import torch

    from lowtide.machine.figure_cache import keep
    from lowtide.planning import machine_rates

    usual = asdict(replace(machine_rates._usual_on_cpu(), assumed=False))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for folder in {machine_rates._usual_folder(), Path(tempfile.gettempdir())}:
            keep("rates", machine_rates._key(torch.device("cpu"), dtype, folder), usual)
    from lowtide.machine.dtype_speeds import DtypeSpeeds, kept_speeds

    alike, slow = (DtypeSpeeds(*[speed] * 5) for speed in (1e11, 1e9))
    kept_speeds({"float32": alike, "bfloat16": alike, "float16": slow})


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """An accelerator: the stand-in of `tests.sim_device` in the default run, a real one in that of `-m gpu`.

    What a test asks of it beside tensors, `lowtide.machine.accelerators` answers for both. Neither is the current
    device where there is another, so that what asks for that one is found out.
    """
    import torch

    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.device_count() - 1)
        return
    from tests.sim_tensor import simulated

    with simulated():
        yield torch.device("sim", 1)


@pytest.fixture(scope="session")
def warm():
    """Runs scripts in processes of their own, without importing torch each time."""
    from tests.document.processes import Warm

    runner = Warm()
    yield runner
    runner.close()
