"""Pipelines in forked children, as servers that preload one have them: under every offload, casting and plan."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.forked import SECONDS, Parked, in_child
from tests.lines import Place, places
from tests.pipelines.test_interrupts import draw

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
ENABLED: dict[str, Callable[[Any], object]] = {
    "nothing": lambda pipe: None,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "leaves ahead": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
    "8 bits": lambda pipe: [pipe.unet.enable_layerwise_casting(), pipe.enable_model_cpu_offload(device="cpu")],
    "a plan": lambda pipe: pipe.fit(ram="8GB", height=8, width=8, steps=1),
}
SOURCES = ("self._refuse(", "_claims.begin", "stage_started(name", "self._hand_on", "told.pop()", "result = call(")
"""Of lines at which another thread is: where it holds a lock, computes, or has begun what it would end."""


def made(folder: Path, enabled: str) -> tuple[Any, torch.Tensor]:
    """A pipeline that was not called so far, and what one under no rule draws."""
    pipe, other = fits.small(folder), fits.small(folder)
    ENABLED[enabled](pipe)
    if enabled == "8 bits":
        other.unet.enable_layerwise_casting()
    return pipe, draw(other)


@pytest.mark.parametrize("enabled", ENABLED)
def test_before_and_after_a_first_call_and_beside_one(tmp_path: Path, enabled: str) -> None:
    pipe, expected = made(tmp_path, enabled)
    assert torch.equal(in_child(lambda: draw(pipe)), expected)
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(in_child(lambda: draw(pipe)), expected)
    every = chosen(pipe)
    beside(pipe, expected, [every[list(ENABLED).index(enabled) % len(every)]])


@pytest.mark.slow
@pytest.mark.parametrize("enabled", ENABLED)
def test_beside_a_call_at_every_such_line(tmp_path: Path, enabled: str) -> None:
    pipe, expected = made(tmp_path, enabled)
    assert torch.equal(draw(pipe), expected)
    beside(pipe, expected, chosen(pipe))


def beside(pipe: Any, expected: torch.Tensor, at: Sequence[Place]) -> None:
    """Fork while another thread is at one of these lines of a call."""
    assert at
    for place in at:
        with Parked(lambda: draw(pipe), place) as parked:
            assert parked.has_come, str(place)
            assert torch.equal(in_child(lambda: drawn_twice(pipe)), expected), str(place)
        assert torch.equal(parked.result, expected), str(place)


def drawn_twice(pipe: Any) -> torch.Tensor:
    first = draw(pipe)
    pipe.unfit()
    pipe.disable_model_cpu_offload()
    assert torch.equal(draw(pipe), first)
    return first


def chosen(pipe: Any) -> list[Place]:
    every = places(lambda: draw(pipe), ("fitting", "pipelines", "stages", "measuring", "casting"))
    return [place for source in SOURCES for place in every if place.source.startswith(source)]


def test_a_pool_of_processes(tmp_path: Path) -> None:
    pipe, expected = made(tmp_path, "leaves ahead")
    assert torch.equal(draw(pipe), expected)
    _SHARED.append(pipe)
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            numbers = pool.map_async(_drawn_in_pool, range(4)).get(SECONDS)
    finally:
        _SHARED.clear()
    assert all(torch.equal(torch.tensor(drawn), expected) for drawn in numbers)


_SHARED: list[Any] = []


def _drawn_in_pool(_: int) -> Any:
    return draw(_SHARED[0]).tolist()


def test_from_a_callback_which_goes_on_in_both(tmp_path: Path) -> None:
    pipe, expected = made(tmp_path, "leaves ahead")
    inside: list[torch.Tensor] = []

    def fork(*_: Any) -> dict[str, Any]:
        if not inside:
            inside.append(in_child(lambda: made(tmp_path, "model offload")[1]))
        return {}

    size = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8}
    (drawn, _) = pipe(
        "a boat", **size, generator=tiny.seeded(0), output_type="pt", return_dict=False, callback_on_step_end=fork
    )
    assert torch.equal(drawn, expected)
    assert torch.equal(inside[0], expected)
