"""Two pipelines at once, in threads of one process: each plans, loads and computes as it does alone."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.fitting.fits import bare_machine, checkpoint, load, make  # noqa: F401
from torch import nn

from lowtide.machine import heap

KINDS = ("pictures", "clips")
RAM = 10**9
SIZE = {"pictures": {"pictures": 2, "steps": 3, "output": "pt"}, "clips": {"steps": 3, "output": "pt"}}
WAIT = 60


@pytest.fixture
def folders(tmp_path, bare_machine):  # noqa: F811
    return {kind: checkpoint(tmp_path / kind, kind) for kind in KINDS}


def chosen(plan):
    """What a plan has components and stages do."""
    parts = {name: (one.rule, one.casting) for name, one in plan.components.items()}
    return parts, {stage.name: stage.way for stage in plan.stages}


def read(folder, kind):
    """The pipeline in a folder, planned for the size of `make`."""
    return load(folder, kind, ram=RAM, size=SIZE[kind])


def read_and_run(folder, kind):
    pipe = read(folder, kind)
    return chosen(pipe.plan), make(pipe)


def plan_and_run(pipe):
    """The plan for the usual size, which `make` does not have, and what is made after it."""
    return chosen(pipe.fit(ram=RAM)), make(pipe)


def alone(folders):
    """Pipelines, and what the jobs of `start` give one after another."""
    pipes = {kind: read(folders[kind], kind) for kind in KINDS}
    plan = chosen(pipes["clips"].plan)
    pictures, clip = make(pipes["pictures"]), make(pipes["clips"])
    return pipes, [pictures, clip, plan_and_run(pipes["pictures"]), (plan, clip)]


def start(pool, pipes, folders):
    """Four threads: a call of each pipeline, a plan for another size of one, and the files of the other read again."""
    yield pool.submit(make, pipes["pictures"])
    yield pool.submit(make, pipes["clips"])
    yield pool.submit(plan_and_run, pipes["pictures"])
    yield pool.submit(read_and_run, folders["clips"], "clips")


def are_equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    return ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_each_plans_loads_and_computes_as_it_does_alone(folders):
    pipes, expected = alone(folders)
    for pipe in pipes.values():
        pipe.applied.fit.meta.traced.clear()  # so that all is traced again, also for what is read
    module_call, filters, collecting = nn.Module.__call__, list(warnings.filters), gc.isenabled()
    classes, done = set(), threading.Event()

    def watch():
        while not done.wait(0.01):
            classes.add(nn.Module.__call__)

    with ThreadPoolExecutor(1) as watcher, ThreadPoolExecutor(4) as pool:
        watcher.submit(watch)
        try:
            results = [job.result(WAIT) for job in list(start(pool, pipes, folders))]
        finally:
            done.set()
    assert all(map(are_equal, results, expected))
    assert classes == {module_call}
    assert warnings.filters == filters
    assert gc.isenabled() == collecting
    assert not heap.MALLOC._wishes


def test_neither_waits_for_the_other_ones_run(folders):
    """Each step waits until the other pipeline is in one of its steps too."""
    pipes = [read(folders[kind], kind) for kind in KINDS]
    both = threading.Barrier(2, timeout=WAIT)

    def meet(pipe, step, timestep, tensors):
        both.wait()
        return {}

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(make, pipe, callback_on_step_end=meet) for pipe in pipes]:
            job.result(WAIT)
