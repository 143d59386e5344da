"""Ctrl-C on the lines of a pipeline's run: the next run is as if it had not been pressed, and nothing stays disabled.

The lines of `lowtide.memory` and `lowtide.casting` are in `tests/memory/test_interrupts.py`. One thing is not made
good: where the interrupt comes into the telling of the end of a stage (`stages._tell_end`, and the first lines of an
observer's own `stage_finished`), an observer that the user keeps, such as a meter, has that stage open for good.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.lines import Place, at_lines_of, interrupted, places, watched

from lowtide.machine.heap import MALLOC
from lowtide.measuring.meter import Meter
from lowtide.memory import attachment_of

RUN = ("calls", "fitting", "pipelines/base", "pipelines/decod", "pipelines/latents", "pipelines/scheduler_claim")
WATCHERS = ("forks", "machine", "measuring", "progress", "quiet", "stages", "weights")
ENABLED: dict[str, Callable[[Any], object]] = {
    "nothing": lambda pipe: None,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "leaves ahead": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
    "a plan": lambda pipe: pipe.fit(ram="8GB", height=8, width=8, steps=1),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = fits.small(tmp_path_factory.mktemp("pipe"))
    made.stages.observers.append(Meter(None))
    return made


def draw(pipe: Any) -> torch.Tensor:
    size = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8}
    return pipe("a boat", **size, generator=tiny.seeded(0), output_type="pt", return_dict=False)[0]


@pytest.mark.parametrize("enabled", ["nothing", "a plan"])
def test_the_next_run_is_undisturbed(pipe: Any, enabled: str) -> None:
    check(pipe, enabled, every=8 if enabled == "nothing" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("enabled", ENABLED)
def test_on_every_line(pipe: Any, enabled: str) -> None:
    check(pipe, enabled, every=1)


def check(pipe: Any, enabled: str, *, every: int) -> None:
    expected = draw(pipe)
    ENABLED[enabled](pipe)
    try:
        draw(pipe)
        for place in [*lines(pipe, RUN)[::every], *lines(pipe, WATCHERS)[:: 2 * every]]:
            pipe.stages.observers[:] = [Meter(None)]
            assert interrupted(lambda: draw(pipe), place), str(place)
            assert torch.equal(draw(pipe), expected), str(place)
            check_free(pipe, place)
    finally:
        pipe.unfit()
        pipe.disable_model_cpu_offload()
    assert all(attachment_of(module) is None for module in pipe.modules().values())
    assert torch.equal(draw(pipe), expected)


def lines(pipe: Any, parts: tuple[str, ...]) -> list[Place]:
    return places(lambda: draw(pipe), parts)


def check_free(pipe: Any, place: Place) -> None:
    """Nothing of the process, or of the pipeline, is as only a run has it; another thread may call."""
    assert gc.isenabled(), str(place)
    assert torch.is_grad_enabled(), str(place)
    assert not MALLOC._wishes, str(place)
    assert len(pipe.stages.watching) == 1, str(place)
    assert is_free_for_others(pipe), str(place)


def is_free_for_others(pipe: Any) -> bool:
    """Whether other threads may call."""
    locks = [pipe.call_lock._lock, *(stream.lock for stream in pipe.streams())]
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.extend(map(is_free, locks)))
    thread.start()
    thread.join()
    return all(free)


def is_free(lock: Any) -> bool:
    if not lock.acquire(timeout=1):
        return False
    lock.release()
    return True


def test_in_the_code_of_context_managers(pipe: Any) -> None:
    """What is left there ends at once, and not by a collection of garbage, which may come in another thread."""
    expected = draw(pipe)
    ENABLED["leaves ahead"](pipe)
    lines: dict[int, None] = {}
    pipe.stages.observers[:] = [Meter(None)]
    gc.disable()
    try:
        at_lines_of(contextlib.__file__, lambda: draw(pipe), lines.setdefault)
        for line in lines:
            place = Place(contextlib.__file__, line, leaves=False)
            if place.is_possible and interrupted_the_second_time(lambda: draw(pipe), place):
                assert is_free_for_others(pipe), str(place)
                assert torch.equal(draw(pipe), expected), str(place)
    finally:
        gc.enable()
        pipe.disable_model_cpu_offload()


def interrupted_the_second_time(call: Callable[[], Any], place: Place) -> bool:
    passed: list[int] = []

    def at(line: int) -> None:
        passed.extend([line] if line == place.line else [])
        if line == place.line and len(passed) == 2:
            raise KeyboardInterrupt

    try:
        at_lines_of(place.file, call, at)
    except KeyboardInterrupt:
        return True
    return False


def test_an_interrupt_that_is_kept_says_so_and_harms_once(tmp_path: Path) -> None:
    """As an interactive Python keeps the last error, and with it the frames of the call."""
    pipe = fits.small(tmp_path)
    expected = draw(pipe)
    (end,) = [place for place in lines(pipe, ("fitting/call_lock",)) if "_calls.end(" in place.source]
    kept: list[BaseException] = []

    def at(place: Place) -> None:
        if place == end:
            raise KeyboardInterrupt

    try:
        watched(lambda: draw(pipe), at, (end.file,))
    except KeyboardInterrupt as error:
        kept.append(error)
    with pytest.raises(RuntimeError, match="being called"):
        draw(pipe)
    kept.clear()
    assert torch.equal(draw(pipe), expected)
