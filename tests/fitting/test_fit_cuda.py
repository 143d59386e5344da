"""Budgets on a CUDA device: the allocator's own limit is set to what was planned, and holds."""

from pathlib import Path

import pytest
import torch

import lowtide

SHIPPED = Path(lowtide.__file__).parent / "assets" / "seascapes"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(pipe, size=256):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"}
    return pipe("a boat", height=size, width=size, **call).images


@pytest.fixture(scope="module")
def plain():
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float16)
    return draw(pipe.to("cuda"))


@pytest.fixture
def limited():
    """Sets the allocator's limit, and takes it away afterwards."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    yield lambda nbytes: torch.cuda.set_per_process_memory_fraction(nbytes / total)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_allocators_limit_is_never_reached(plain, limited, share):
    from lowtide.planning.planner import Planner

    pipe = lowtide.StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float16)
    pipe.fit(vram="80%", height=256, width=256, steps=3, output="pt")
    fit = pipe.applied.fit
    curve = Planner(fit.workload, fit.rates).curve(fit.budgets)
    least, most = curve[0][0], curve[-1][0]
    plan = pipe.fit(vram=int(least + share * (most - least)), height=256, width=256, steps=3, output="pt")
    limited(max(stage.peak - stage.base for stage in plan.stages))
    torch.cuda.reset_peak_memory_stats()
    made = draw(pipe)
    assert torch.equal(made, plain) if plan.exactness == "equal bits" else torch.allclose(made, plain, atol=2e-2)
    assert torch.cuda.max_memory_allocated() <= max(stage.allocated for stage in plan.stages)
    assert not pipe.degradations


def test_a_limit_that_was_not_told_is_worked_around(plain, limited):
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float16)
    plan = pipe.fit(vram="80%", height=256, width=256, steps=3, output="pt")
    limited(int(0.8 * max(stage.peak - stage.base for stage in plan.stages)))
    with pytest.warns(UserWarning, match="memory ran out"):
        made = draw(pipe)
    assert torch.allclose(made, plain, atol=2e-2)
    assert pipe.degradations
