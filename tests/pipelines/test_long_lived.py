"""A process that lives long: calls of changing sizes, plans, castings and files, and failures, leave nothing behind."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits

from lowtide.machine.heap import trim_heap

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

PLANS: dict[str, Callable[[Any], object]] = {
    "resident": lambda pipe: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "leaves ahead": lambda pipe: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
    "blocks ahead": lambda pipe: pipe.enable_group_offload("cpu", use_stream=True),
    "8 bits": lambda pipe: pipe.unet.enable_layerwise_casting(torch.int8, torch.float32),
    "rows": lambda pipe: pipe.enable_vae_tiling("exact"),
    "a budget": lambda pipe: pipe.fit(ram="4GB"),
}
SIZES = [(16, 16), (16, 24), (32, 16)]


class StopError(Exception):
    pass


def stop(*_: object) -> None:
    raise StopError


def a_round(pipe: Any, folder: Path, plans: Sequence[str]) -> None:
    for place, name in enumerate(plans):
        PLANS[name](pipe)
        height, width = SIZES[place % len(SIZES)]
        asked: dict[str, Any] = {"num_inference_steps": 2, "height": height, "width": width}
        pipe("a boat", **asked, output_type="pt")
        pipe("a boat", **asked, output_type="file", output_path=folder / "x.png")
        with pytest.raises(StopError):
            pipe("a boat", **asked, callback_on_step_end=stop)
        pipe.unfit()
        pipe.disable_model_cpu_offload()
        pipe.disable_vae_tiling()
        if name == "8 bits":
            pipe.unet.disable_layerwise_casting()


def anonymous() -> int:
    gc.collect()
    trim_heap()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous:")).split()[1])


def held(folder: Path) -> dict[str, int]:
    """What a process can run out of besides memory."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()) // 50,
        "threads": threading.active_count(),
        "temporary files": len(os.listdir(folder)),
    }


@pytest.mark.parametrize(
    ("plans", "rounds"),
    [(["leaves ahead", "8 bits", "rows"], 2), pytest.param(list(PLANS), 9, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_left_behind(plans: list[str], rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    fits.small(tmp_path / "words").save_pretrained(tmp_path / "model")
    pipe = _loaded(tmp_path / "model")
    expected = pipe("a boat", num_inference_steps=2, generator=tiny.seeded(0), height=16, width=16, output_type="pt")
    for _ in range(2):
        a_round(pipe, tmp_path, plans)
    before, memory = held(temporary), anonymous()
    for _ in range(rounds):
        a_round(pipe, tmp_path, plans)
    after = held(temporary)
    assert all(after[name] <= before[name] + 1 for name in before), (before, after)
    assert anonymous() <= memory + 2**20 * (4 + rounds // 4)
    again = pipe("a boat", num_inference_steps=2, generator=tiny.seeded(0), height=16, width=16, output_type="pt")
    assert torch.equal(again.images, expected.images)


def _loaded(folder: Path) -> Any:
    from lowtide import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
