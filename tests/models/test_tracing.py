"""Our U-Net traced, exported and compiled; and refused, kindly, while its weights come and go."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import pytest
import torch
from tests import tiny
from tests.thinned import thinned
from torch import nn

from lowtide.casting.cast_leaf import leaves

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(autouse=True)
def without_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def inputs(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, 4, 8, 8, generator=draw)
    return sample, torch.rand(1, generator=draw) * 999, torch.randn(2, 6, 24, generator=draw)


@pytest.fixture(autouse=True)
def as_traced():
    """Traces run as they are: PyTorch takes seconds to optimize one in its first calls."""
    with torch.jit.optimized_execution(False):
        yield


HEADS = {"sd1": 2, "sd2": [1, 2]}


def small_unet(kind="sd1", levels=2):
    """Two levels of one layer, with every kind of block: tracing takes its time for each module."""
    blocks = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    changes = {
        "block_out_channels": [8, 16][:levels],
        "down_block_types": blocks[0][:levels],
        "up_block_types": blocks[1][-levels:],
    }
    return tiny.unet(kind, **changes, layers_per_block=1, attention_head_dim=HEADS[kind])


def unet(kind="sd1", levels=2):
    module = small_unet(kind, levels)
    module.forward = functools.partial(module.forward, return_dict=False)
    return module


@pytest.mark.parametrize(("kind", "layout"), thinned(["sd1", "sd2"], [torch.contiguous_format, torch.channels_last]))
def test_a_trace_saved_and_loaded_equals_the_network(tmp_path, kind, layout):
    module = unet(kind).to(memory_format=layout)
    traced = torch.jit.trace(module, inputs())
    traced.save(tmp_path / "unet.pt")
    loaded = torch.jit.load(tmp_path / "unet.pt")
    for seed in (1, 2):
        expected = module(*inputs(seed))[0]
        for one in (traced, loaded):
            assert (one(*inputs(seed))[0] - expected).abs().max() <= 1e-5
        assert (traced(inputs(seed)[0], torch.zeros(1), inputs(seed)[2])[0] - expected).abs().max() > 1e-3


def test_a_traced_network_in_the_pipeline(tmp_path):
    pipe = tiny.pipeline(tmp_path, unet=small_unet())
    draw = functools.partial(pipe, "a cat", num_inference_steps=3, output_type="pt", height=32, width=32)
    expected = draw(generator=torch.Generator().manual_seed(0)).images

    @dataclass
    class Output:
        sample: torch.Tensor

    class TracedUNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_channels = pipe.unet.config.in_channels
            self.device = pipe.unet.device
            pipe.unet.forward = functools.partial(pipe.unet.forward, return_dict=False)
            size = 32 // pipe.vae_scale_factor
            example = (torch.randn(2, 4, size, size), torch.tensor(7), torch.randn(2, 16, 24))
            self.traced = torch.jit.trace(pipe.unet, example)

        def forward(self, latent_model_input, t, encoder_hidden_states):
            return Output(self.traced(latent_model_input, t, encoder_hidden_states)[0])

    pipe.unet = TracedUNet()
    assert (draw(generator=torch.Generator().manual_seed(0)).images - expected).abs().max() <= 1e-5
    assert (draw(generator=torch.Generator().manual_seed(1)).images - expected).abs().max() > 1e-3


def test_exported():
    module = unet()
    expected = module(*inputs(1))[0]
    exported = torch.export.export(module, inputs())
    assert (exported.module()(*inputs(1))[0] - expected).abs().max() <= 1e-5


@pytest.mark.slow
def test_compiled():
    module = unet()
    expected = module(*inputs(1))[0]
    compiled = torch.compile(module, backend="aot_eager")
    assert (compiled(*inputs(1))[0] - expected).abs().max() <= 1e-5


def test_a_part_compiled():
    """Residual blocks and attention, which take most of the time of compiling the whole."""
    module = small_unet(levels=1).mid_block
    given = [(torch.randn(2, 8, 8, 8), torch.randn(2, 32), inputs(seed)[2], None) for seed in (0, 1)]
    compiled = torch.compile(module, backend="aot_eager")
    for one in given:
        assert (compiled(*one) - module(*one)).abs().max() <= 1e-5
    assert (module(*given[0]) - module(*given[1])).abs().max() > 1e-3


def offloaded(module):
    module.enable_group_offload("cpu", offload_type="leaf_level")


def whole(module):
    module.enable_group_offload("cpu", offload_type="block_level")


def cast(module):
    module.enable_layerwise_casting(torch.int8)


PLANS = [offloaded, whole, cast]
WAYS = {"trace": torch.jit.trace, "export": torch.export.export}


@pytest.mark.parametrize(("plan", "way"), thinned(PLANS, WAYS))
def test_a_trace_of_weights_that_come_and_go_is_refused(plan, way):
    module = unet(levels=1)
    plan(module)
    expected = module(*inputs())[0]
    with pytest.raises(RuntimeError, match=r"cannot be traced, exported or compiled .*disable_layerwise_casting"):
        WAYS[way](module, inputs())
    assert torch.equal(module(*inputs())[0], expected)  # nothing is left in the slots
    module.disable_group_offload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.disable_layerwise_casting()
    assert not leaves(module)
    WAYS[way](module, inputs())


@pytest.mark.parametrize("plan", [pytest.param(p, marks=() if p is whole else pytest.mark.slow) for p in PLANS])
def test_compiling_goes_around_the_plan(plan):
    module = unet(levels=1)
    plan(module)
    expected = module(*inputs())[0]
    compiled = torch.compile(module, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(*inputs())[0], expected)
