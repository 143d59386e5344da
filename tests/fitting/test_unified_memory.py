"""Devices whose memory is the host's: one budget for both, and nothing is there twice. On a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.sim_tensor import simulated

import lowtide
from lowtide.fitting.budgets import parse_budgets
from lowtide.fitting.process import USUAL_BASE
from lowtide.memory.attach import attachment_of
from lowtide.memory.rule import Tier
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.planning.plan import BudgetError, Plan

SIZE = {"height": 64, "width": 64, "steps": 2, "output": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    fits.small(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


def pictures(pipe: StableDiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    return pipe("a boat", **call, generator=tiny.seeded(0)).images.cpu()


def least(pipe: StableDiffusionPipeline) -> int:
    with pytest.raises(BudgetError) as refusal:
        lowtide.fit(pipe, ram="1MB", device="sim", **SIZE)
    assert refusal.value.minimum.vram is None
    assert refusal.value.minimum.ram is not None
    return refusal.value.minimum.ram


@pytest.mark.parametrize("streams", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_same_within_one_budget(folder: Path, *, streams: bool) -> None:
    with simulated(unified=True, streams=streams, pins=streams) as sim:
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        expected = pictures(pipe.to("sim"))
        pipe.to("cpu")
        smallest = least(pipe)
        for ram in (smallest, "8GB"):
            plan = lowtide.fit(pipe, ram=ram, device="sim", **SIZE)
            assert torch.equal(pictures(pipe), expected)
            assert plan.unified
            assert plan.budgets.vram is None
            assert all(stage.host == stage.peak >= USUAL_BASE for stage in plan.stages), "the process is in it"
            assert Plan.from_json(plan.to_json()) == plan
            for part in plan.components.values():
                assert part.rule is None or part.rule.rest is Tier.DISK, "what rests on the host would be there twice"
        lowtide.unfit(pipe)
        assert sim.devices[1].counts.launches == 0


def test_vram_and_ram_are_one_budget() -> None:
    with simulated(unified=True):
        device = torch.device("sim", 0)
        assert parse_budgets(device, "3GB", "5GB").ram == 3 * 10**9
        assert parse_budgets(device, "5GB", "3GB").ram == 3 * 10**9
        assert parse_budgets(device, "3GB").ram == 3 * 10**9
        assert parse_budgets(device, None, "3GB").vram is None


def test_offloads_rest_on_disk_unless_told_otherwise(folder: Path) -> None:
    with simulated(unified=True):
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe.enable_model_cpu_offload(device="sim")
        attachment = attachment_of(pipe.unet)
        assert attachment is not None
        assert attachment.rule.rest is Tier.DISK
        pictures(pipe)
