"""Two threads on one pipeline: whichever comes second waits, whether it calls the pipeline, saves or changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.fitting.fits import bare_machine  # noqa: F401
from tests.forked import Beside, Parked
from tests.lines import line_of, places
from tests.pipelines.test_interrupts import draw

from lowtide import StableDiffusionPipeline

BETWEEN_NETWORKS = line_of("pipelines/stable_diffusion.py", "x = self.take_step(")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fits.small(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def expected(made: Any) -> torch.Tensor:
    return draw(made)


@pytest.fixture
def pipe(made: Any, bare_machine: None) -> Iterator[Any]:  # noqa: F811
    yield made
    made.unfit()
    made.disable_model_cpu_offload()
    made.to(torch.float32)
    made.disable_vae_slicing()
    made.disable_vae_tiling()
    made.disable_attention_slicing()
    made.set_attention_backend("sdpa")


CHANGES: dict[str, Callable[[Any], object]] = {
    "to": lambda pipe: pipe.to(torch.float64),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group offload": lambda pipe: pipe.enable_group_offload("cpu"),
    "no offload": lambda pipe: pipe.disable_model_cpu_offload(),
    "slicing": lambda pipe: pipe.enable_vae_slicing(),
    "no slicing": lambda pipe: pipe.disable_vae_slicing(),
    "tiling": lambda pipe: pipe.enable_vae_tiling("exact"),
    "no tiling": lambda pipe: pipe.disable_vae_tiling(),
    "attention": lambda pipe: pipe.set_attention_backend("math"),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing("max"),
    "no attention slicing": lambda pipe: pipe.disable_attention_slicing(),
    "no xFormers": lambda pipe: pipe.disable_xformers_memory_efficient_attention(),
    "budget": lambda pipe: pipe.fit(ram="8GB", height=8, width=8, steps=1),
    "no budget": lambda pipe: pipe.unfit(),
}


def test_a_change_waits_for_a_call(pipe: Any, expected: torch.Tensor) -> None:
    with Parked(lambda: draw(pipe), BETWEEN_NETWORKS) as parked:
        changes = {name: Beside(lambda change=change: change(pipe)) for name, change in CHANGES.items()}
        assert [name for name, change in changes.items() if not change.waits] == []
    assert torch.equal(parked.result, expected)
    for change in changes.values():
        change.ended()


def test_a_change_is_possible_in_a_callback(pipe: Any, expected: torch.Tensor) -> None:
    """As it is without threads."""

    def change(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.enable_model_cpu_offload(device="cpu")
        pipe.enable_vae_slicing()
        return {}

    size = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8, "output_type": "pt"}
    made = pipe("a boat", **size, generator=tiny.seeded(0), callback_on_step_end=change, return_dict=False)[0]
    assert torch.equal(made, expected)


def test_what_is_saved_is_not_what_a_call_has_loaded(pipe: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    pipe.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    draw(pipe)
    with Parked(lambda: draw(pipe), line_of("memory/attach.py", "return out_of_buffers(call(")) as parked:
        whole = Beside(lambda: pipe.save_pretrained(tmp_path / "saved"))
        unet = Beside(lambda: pipe.unet.save_pretrained(tmp_path / "unet"))
        assert whole.waits
        assert unet.waits
    assert torch.equal(parked.result, expected)
    whole.ended()
    unet.ended()
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert torch.equal(draw(saved), expected)
    saved.unet = type(saved.unet).from_pretrained(tmp_path / "unet")
    assert torch.equal(draw(saved), expected)


def test_each_of_two_calls_has_a_file_of_its_own(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both are to choose a new name, and the second is called before the first has written its file."""
    monkeypatch.chdir(tmp_path)

    def write(seed: int) -> list[Path]:
        size = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 8, "width": 8}
        return pipe("a boat", **size, generator=tiny.seeded(seed), output_type="file").images

    with Parked(lambda: write(0), BETWEEN_NETWORKS) as parked:
        other = Beside(lambda: write(1))
        assert other.waits
    names = [path.name for path in (*parked.result, *other.ended())]
    assert len(set(names)) == 2
    assert all((tmp_path / name).is_file() for name in names)


def test_a_report_during_a_call_is_of_the_call_before_and_its_plan(pipe: Any) -> None:
    pipe.fit(ram="8GB", height=8, width=8, steps=1)
    draw(pipe)
    before = pipe.report().to_dict()
    with Parked(lambda: pipe("a boat", height=8, width=8, num_inference_steps=2), BETWEEN_NETWORKS):
        assert pipe.report().to_dict() == before
    assert pipe.report().to_dict() != before


@pytest.mark.parametrize("asked", ["plan", "degradations"])
def test_what_is_undone_between_two_looks(pipe: Any, asked: str) -> None:
    pipe.applied = SimpleNamespace(plan="a plan", degradations=["smaller"])
    (_, look) = places(lambda: getattr(pipe, asked), ("pipelines/base",))
    with Parked(lambda: getattr(pipe, asked), look) as parked:
        pipe.applied = None
    assert parked.result
