"""The arguments of the offloads: what each means, and what is said of those that are not possible."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.memory.cases import CASES, plain

from lowtide import hooks
from lowtide.memory import Level, Rule, Tier, apply_residency, attachment_of
from lowtide.memory.presets import execution_device, group_rule, named_rule


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"offload_type": "blocks"}, "block_level, leaf_level"),
        ({"num_blocks_per_group": 0}, "1 or more"),
        ({"num_blocks_per_group": -1}, "1 or more"),
        ({"offload_device": "cuda"}, "offload_to_disk_path"),
        ({"onload_device": "hpu"}, "'cpu', 'cuda', 'xpu', 'mps'"),
        ({"block_modules": ["nothing"]}, "its lists are"),
    ],
)
def test_group_offload_that_is_not_possible(arguments: dict[str, Any], told: str) -> None:
    case = CASES["unet"](torch.float32)
    with pytest.raises(ValueError, match=told):
        hooks.apply_group_offloading(case.module, **{"onload_device": "cpu", **arguments})
    assert attachment_of(case.module) is None
    assert torch.equal(case.run(), plain("unet", "fp32"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    pipe = tiny.pipeline(tmp_path)
    for call in (
        lambda: pipe.enable_model_cpu_offload(device="cuda"),
        lambda: pipe.enable_sequential_cpu_offload(gpu_id=1),
        lambda: pipe.unet.enable_group_offload(torch.device("cuda")),
    ):
        with pytest.raises(ValueError, match="sees no CUDA devices"):
            call()
    assert execution_device() == torch.device("cpu")


def test_devices_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="contradict"):
        execution_device("cuda:1", 0)
    assert execution_device("cpu", 0) == torch.device("cpu")


@pytest.mark.parametrize("name", ["record_stream", "non_blocking"])
def test_what_has_no_effect_is_said(name: str) -> None:
    module = CASES["unet"](torch.float32).module
    with pytest.warns(UserWarning, match=f"{name} have no effect"):
        hooks.apply_group_offloading(module, "cpu", **{name: True})
    attachment = attachment_of(module)
    assert attachment is not None
    assert attachment.rule.level is Level.BLOCK


def test_what_the_arguments_mean(tmp_path: Path) -> None:
    device, rule = group_rule("cpu", num_blocks_per_group=3, use_stream=True, offload_to_disk_path=str(tmp_path))
    assert device == torch.device("cpu")
    assert rule == Rule(
        Level.BLOCK, Tier.DISK, blocks_per_group=3, prefetch=1, spill=True, spill_folder=str(tmp_path), pin=True
    )
    assert group_rule("cpu", offload_type="leaf_level")[1] == Rule(Level.LEAF, Tier.DISK, prefetch=0, pin=False)
    assert not group_rule("cpu", use_stream=True, low_cpu_mem_usage=True)[1].pin
    with pytest.raises(ValueError, match="model, block, leaf, sequential"):
        named_rule("fast", device)


def test_the_peers_arguments_are_all_there() -> None:
    import diffusers
    from diffusers.hooks import apply_group_offloading

    from lowtide import DiffusionPipeline, UNet2DConditionModel

    pairs = [
        (hooks.apply_group_offloading, apply_group_offloading),
        (UNet2DConditionModel.enable_group_offload, diffusers.UNet2DConditionModel.enable_group_offload),
        (DiffusionPipeline.enable_group_offload, diffusers.DiffusionPipeline.enable_group_offload),
        (DiffusionPipeline.enable_model_cpu_offload, diffusers.DiffusionPipeline.enable_model_cpu_offload),
        (DiffusionPipeline.enable_sequential_cpu_offload, diffusers.DiffusionPipeline.enable_sequential_cpu_offload),
    ]
    for ours, theirs in pairs:
        wanted = inspect.signature(theirs).parameters
        assert list(inspect.signature(ours).parameters)[: len(wanted)] == list(wanted), ours


def test_excluded_components(tmp_path: Path) -> None:
    pipe = tiny.pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"\['u-net'\] are no components; there are vae"):
        pipe.enable_group_offload("cpu", exclude_modules=["u-net"])
    assert all(attachment_of(module) is None for module in pipe.modules().values())
    pipe.enable_group_offload("cpu", exclude_modules="vae")
    assert attachment_of(pipe.vae) is None
    assert attachment_of(pipe.unet) is not None
    pipe.disable_group_offload()
    pipe.disable_model_cpu_offload()
    assert all(attachment_of(module) is None for module in pipe.modules().values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"resident_bytes": -1}, "0 or more"),
        ({"resident_bytes": "4 apples"}, "not a size"),
        ({"prefetch": -1}, "0 or more"),
        ({"rest": "tape"}, "'host' or on 'disk'"),
        ({"level": "row"}, "whole, block, leaf"),
        ({"host_bytes": "x"}, "not a size"),
        ({"blocks_per_group": 0}, "1 or more"),
    ],
)
def test_residency_that_is_not_possible(arguments: dict[str, Any], told: str) -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=told):
        apply_residency(module, device="cpu", **arguments)
    assert attachment_of(module) is None


def test_host_memory_is_kept_under_its_budget() -> None:
    case = CASES["unet"](torch.float32)
    attachment = apply_residency(case.module, rest="host", host_bytes="40KB", device="cpu")
    by_tier = dict.fromkeys(Tier, 0)
    for unit in attachment.units:
        for weight in unit.weights:
            by_tier[weight.rest.tier] += weight.nbytes
    assert 0 < by_tier[Tier.HOST] <= 40_000 < by_tier[Tier.DISK]
    assert torch.equal(case.run(), plain("unet", "fp32"))


def test_rules_are_kept_as_json() -> None:
    for rule in (Rule(), Rule(Level.LEAF, Tier.DISK, 2, 3, 10, 20, spill=True, block_modules=("a", "b"))):
        assert Rule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    with pytest.raises(ValueError, match="has no"):
        Rule.from_dict({"size": 1})
