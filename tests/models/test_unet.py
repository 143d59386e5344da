"""What the U-Net promises beyond its numbers: shapes, forms of its arguments, and what depends on what."""

import functools

import pytest
import torch
from tests import tiny

from lowtide.models.unet import UNet2DConditionModel

of_kind = functools.cache(tiny.unet)
"""A U-Net that is only called."""


@pytest.fixture(scope="module")
def model():
    return tiny.unet()


@pytest.mark.parametrize("kind", tiny.UNETS)
@pytest.mark.parametrize("size", [(8, 8), (18, 22), (9, 7), (5, 16), (1, 1), (2, 3)])
@torch.no_grad()
def test_every_size_comes_back_as_it_was(kind, size):
    output = of_kind(kind)(**tiny.unet_inputs(kind, size)).sample
    assert output.shape == (2, 4, *size)
    assert output.isfinite().all()


@torch.no_grad()
def test_every_form_of_one_timestep_is_the_same(model):
    inputs = tiny.unet_inputs()
    expected = model(**inputs).sample
    for timestep in (481, 481.0, torch.tensor(481), torch.tensor([481]), torch.tensor([481.0, 481.0])):
        assert torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)
    for timestep in (480, torch.tensor([481, 480])):
        assert not torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)


@torch.no_grad()
def test_each_item_of_a_batch_stands_alone(model):
    inputs = tiny.unet_inputs(batch=3)
    inputs["timestep"] = torch.tensor([900, 481, 20])
    together = model(**inputs).sample
    for i in range(3):
        alone = model(
            inputs["sample"][i : i + 1], int(inputs["timestep"][i]), inputs["encoder_hidden_states"][i : i + 1]
        )
        assert tiny.difference(together[i : i + 1], alone.sample) < 1e-5
        assert tiny.difference(together[i : i + 1], together[i - 1 : i] if i else together[2:]) > 0.1


@torch.no_grad()
def test_a_hidden_token_has_no_influence(model):
    inputs = tiny.unet_inputs()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1]] * 2)
    expected = model(**inputs, encoder_attention_mask=mask).sample
    context = inputs["encoder_hidden_states"].clone()
    context[:, 4:6] = 9.0
    changed = {**inputs, "encoder_hidden_states": context}
    assert torch.equal(model(**changed, encoder_attention_mask=mask).sample, expected)
    assert not torch.equal(model(**changed, encoder_attention_mask=None).sample, model(**inputs).sample)
    assert torch.equal(model(**inputs, encoder_attention_mask=mask.bool()).sample, expected)


@torch.no_grad()
def test_a_tuple_on_request(model):
    inputs = tiny.unet_inputs()
    output = model(**inputs, return_dict=False)
    assert isinstance(output, tuple)
    assert torch.equal(output[0], model(**inputs).sample)


@torch.no_grad()
def test_the_additions_of_sdxl_must_be_given():
    inputs = tiny.unet_inputs("sdxl")
    model = tiny.unet("sdxl")
    for added in (None, {}, {"text_embeds": inputs["added_cond_kwargs"]["text_embeds"]}):
        with pytest.raises(ValueError, match="needs added_cond_kwargs with 'text_embeds'"):
            model(**{**inputs, "added_cond_kwargs": added})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", tiny.UNETS)
@torch.no_grad()
def test_half_precision_stays_near(kind, dtype):
    inputs = tiny.unet_inputs(kind)
    expected = of_kind(kind)(**inputs).sample
    halved = {**inputs, **{name: inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states")}}
    output = tiny.unet(kind).to(dtype)(**halved).sample
    assert output.dtype == dtype
    error = (output.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (0.15 if dtype == torch.bfloat16 else 0.02)  # three times what the peer's rounding amounts to


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_it_can_be_traced_as_the_ecosystem_does():
    """With positional arguments, a timestep of shape [1] and a tuple as output; the trace takes other timesteps."""
    model, traceable = tiny.unet(**tiny.FEW_BLOCKS), tiny.unet(**tiny.FEW_BLOCKS)
    inputs = tiny.unet_inputs()
    sample, context = inputs["sample"], inputs["encoder_hidden_states"]
    traceable.forward = functools.partial(traceable.forward, return_dict=False)
    traced = torch.jit.trace(traceable, (sample, torch.tensor([481]), context))
    for timestep in (481, 20):
        expected = model(sample, timestep, context).sample
        assert tiny.difference(traced(sample, torch.tensor([timestep]), context)[0], expected) < 1e-5


@torch.no_grad()
def test_memory_format_does_not_change_the_picture(model):
    inputs = tiny.unet_inputs()
    expected = model(**inputs).sample
    last = tiny.unet().to(memory_format=torch.channels_last)
    assert tiny.difference(last(**inputs).sample, expected) < 1e-5


def test_fresh_weights_can_learn():
    model = UNet2DConditionModel.from_config(tiny.UNETS["sd1"])
    model(**tiny.unet_inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
