"""Parts that several pipelines, threads and forked children have in common: what one call sets on them is its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.forked import Parked, in_child
from tests.lines import interrupted, places
from tests.pipelines.test_interrupts import draw

from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline

LINES = "pipelines/clip_skip"


def skip_one(pipe: Any) -> torch.Tensor:
    size = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8, "clip_skip": 1}
    return pipe("a boat", **size, generator=tiny.seeded(0), output_type="pt", return_dict=False)[0]


def sharing(pipe: Any) -> Any:
    """Another pipeline of the same networks."""
    parts = {**pipe.components, "scheduler": tiny.scheduler()}
    other = StableDiffusionPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fits.small(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def whole(pipe: Any) -> torch.Tensor:
    return draw(pipe)


@pytest.fixture(scope="module")
def skipped(pipe: Any, whole: torch.Tensor) -> torch.Tensor:
    drawn = skip_one(pipe)
    assert not torch.equal(drawn, whole)
    return drawn


def test_an_interrupt_leaves_no_layer_out(pipe: Any, whole: torch.Tensor, skipped: torch.Tensor) -> None:
    for place in places(lambda: skip_one(pipe), (LINES,)):
        assert interrupted(lambda: skip_one(pipe), place), str(place)
        assert torch.equal(draw(pipe), whole), str(place)
    assert torch.equal(skip_one(pipe), skipped)


def test_an_interrupt_inside_pytorch_leaves_no_layer_out(
    pipe: Any, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook is there, and nobody has what removes it."""
    register = torch.nn.Module.register_forward_hook

    def interrupt(*given: Any, **options: Any) -> Any:
        register(*given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "register_forward_hook", interrupt)
        with pytest.raises(KeyboardInterrupt):
            skip_one(pipe)
    assert torch.equal(draw(pipe), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_leaves_no_layer_out(pipe: Any, whole: torch.Tensor, skipped: torch.Tensor) -> None:
    for place in places(lambda: skip_one(pipe), (LINES,))[::4]:
        with Parked(lambda: skip_one(pipe), place) as parked:
            assert torch.equal(in_child(lambda: draw(pipe)), whole), str(place)
        assert torch.equal(parked.result, skipped), str(place)


def test_another_thread_leaves_no_layer_out(pipe: Any, whole: torch.Tensor, skipped: torch.Tensor) -> None:
    other = sharing(pipe)
    inside = next(place for place in places(lambda: skip_one(pipe), (LINES,)) if place.source.startswith("given ="))
    with Parked(lambda: skip_one(pipe), inside) as parked:
        assert torch.equal(draw(other), whole)
        assert torch.equal(skip_one(other), skipped)
    assert torch.equal(parked.result, skipped)


class Decoding:
    """An observer of one pipeline: what it is told of decoding, and what is to happen after its first step."""

    def __init__(self, meanwhile: Any) -> None:
        self.steps: list[int] = []
        self._meanwhile = meanwhile

    def stage_started(self, name: str, steps: int | None) -> None:
        pass

    def step_done(self, name: str, step: int) -> None:
        if name == "decode":
            self.steps.append(step)
            if len(self.steps) == 1:
                thread = threading.Thread(target=self._meanwhile)
                thread.start()
                thread.join()

    def stage_finished(self, name: str) -> None:
        pass


def test_each_of_two_pipelines_is_told_how_far_its_own_decoding_is(tmp_path: Path) -> None:
    pipe = fits.small(tmp_path)
    pipe.enable_vae_tiling("exact")
    other = sharing(pipe)
    seen = Decoding(lambda: draw(other))
    pipe.stages.observers.append(seen)
    pipe("a boat", 16, 16, num_inference_steps=1, num_images_per_prompt=2, generator=tiny.seeded(0, 1))
    assert seen.steps[-1] == 100
    pipe.vae.decode(tiny.numbers((1, 4, 2, 2)))
    assert len(seen.steps) == 100, "nobody watches what no pipeline decodes"
