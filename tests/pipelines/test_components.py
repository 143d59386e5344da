"""A pipeline's parts: replaced, moved, converted, or of another library; and schedulers from outdated files."""

import copy
import functools

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from torch import nn

from lowtide.models.model_outputs import UNet2DConditionOutput
from lowtide.pipelines.stable_diffusion import StableDiffusionPipeline
from lowtide.schedulers import DDIMScheduler


@pytest.fixture
def pipe(tmp_path):
    return fits.small(tmp_path)


def draw(pipe, seed=0, **call):
    defaults = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipe("a boat", **{**defaults, "generator": tiny.seeded(seed), **call}).images


class TracedUNet(nn.Module):
    """What the ecosystem's documents put in place of the U-Net: three names, and no configuration."""

    def __init__(self, inner, as_tuple=False):
        super().__init__()
        self.in_channels = inner.config.in_channels
        self.device = inner.device
        self.inner = [inner]  # hidden from torch
        self.as_tuple = as_tuple

    def forward(self, latent_model_input, t, encoder_hidden_states):
        sample = self.inner[0](latent_model_input, t, encoder_hidden_states, return_dict=False)[0]
        return (sample,) if self.as_tuple else UNet2DConditionOutput(sample=sample)


@pytest.mark.parametrize("as_tuple", [True, False])
def test_a_replacement_needs_no_more_than_the_ecosystems(pipe, as_tuple):
    expected = draw(pipe), pipe.image_size(None, None)
    pipe.unet = TracedUNet(pipe.unet, as_tuple)
    assert (draw(pipe), pipe.image_size(None, None))[1] == expected[1]
    assert torch.equal(draw(pipe), expected[0])
    assert pipe.device == torch.device("cpu")
    assert pipe.dtype == torch.float32
    assert "TracedUNet" in repr(pipe)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_unet_draws_the_same_picture(pipe):
    expected = draw(pipe)
    unet = tiny.unet(**fits.UNET)
    unet.forward = functools.partial(unet.forward, return_dict=False)
    example = tiny.numbers((2, 4, 4, 4)), torch.tensor([1]), tiny.numbers((2, 16, 24))
    traced = torch.jit.trace(unet, example, check_trace=False)

    class Traced(TracedUNet):
        def forward(self, latent_model_input, t, encoder_hidden_states):
            return UNet2DConditionOutput(sample=traced(latent_model_input, t, encoder_hidden_states)[0])

    pipe.unet = Traced(pipe.unet)
    with torch.jit.optimized_execution(False):  # which would take seconds, to no use here
        assert (draw(pipe) - expected).abs().max() < 1e-4


def test_a_forward_that_returns_tuples(pipe):
    expected = draw(pipe)
    pipe.unet.forward = functools.partial(pipe.unet.forward, return_dict=False)
    assert torch.equal(draw(pipe), expected)


def test_a_part_of_another_library_needs_its_answers_only(pipe):
    """An autoencoder from elsewhere: a configuration, and `decode` with an answer that has `.sample`."""

    class Answer:
        def __init__(self, sample):
            self.sample = sample

    class Elsewhere(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def decode(self, z, return_dict=True):
            sample = self.inner.decode(z).sample
            return Answer(sample) if return_dict else (sample,)

    expected = draw(pipe)
    parts = {**pipe.components, "vae": Elsewhere(pipe.vae)}
    other = StableDiffusionPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other), expected)


def test_another_scheduler_may_be_put_in_at_any_time(pipe):
    first = draw(pipe, num_inference_steps=4)
    for name, cls in tiny.SCHEDULERS.items():
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        assert draw(pipe, num_inference_steps=4).isfinite().all(), name
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(draw(pipe, num_inference_steps=4), first)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"clip_sample": True}, "clip_sample=True to False"),
        ({"steps_offset": 0}, "steps_offset=0 to 1"),
        ({"clip_sample": True, "steps_offset": 0}, "clip_sample=True to False, steps_offset=0 to 1"),
    ],
)
def test_an_outdated_scheduler_file_is_corrected_and_told(tmp_path, entries, told):
    with pytest.warns(UserWarning, match=f"is outdated: it is changed from {told}") as caught:
        pipe = fits.small(tmp_path, schedule=tiny.scheduler(**entries, beta_end=0.013))
    assert len(caught) == 1
    assert pipe.scheduler.config == tiny.scheduler(beta_end=0.013).config


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"steps_offset": 0, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {"steps_offset": 0, "timestep_spacing": "linspace"}),
    ],
)
def test_a_scheduler_without_fault_is_taken_as_it_is(tmp_path, name, entries):
    schedule = tiny.scheduler(name, **entries)
    assert fits.small(tmp_path, schedule=schedule).scheduler is schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype):
    expected = draw(pipe, guidance_scale=1.0)
    assert pipe.to(dtype) is pipe
    assert pipe.dtype == dtype
    picture = draw(pipe, guidance_scale=1.0)
    assert picture.dtype == dtype
    assert (picture - expected).abs().mean() < 0.05
    assert draw(pipe, output_type="np").dtype == "float32"


def test_embeddings_in_full_precision_serve_a_pipeline_in_half(pipe):
    with torch.no_grad():
        negative, positive = pipe.to(torch.bfloat16).encode_prompt("a boat").chunk(2)
    embeds = {"prompt_embeds": positive.float(), "negative_prompt_embeds": negative.float()}
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "pt"}
    pictures = [pipe(**call, **which, generator=tiny.seeded(0)).images for which in (embeds, {"prompt": "a boat"})]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("cpu", torch.float64), {}),
        ((torch.float64, torch.device("cpu")), {}),
        ((), {"device": "cpu", "dtype": torch.float64}),
    ],
)
def test_to_takes_device_and_dtype_in_any_order(pipe, targets, options):
    pipe.to(*targets, **options)
    assert {p.dtype for part in pipe.modules().values() for p in part.parameters()} == {torch.float64}


def test_parts_by_name(pipe):
    assert list(pipe.components) == list(StableDiffusionPipeline.component_names)
    assert pipe.modules().keys() == {"vae", "text_encoder", "unet"}
    rebuilt = StableDiffusionPipeline(**pipe.components)
    assert rebuilt.unet is pipe.unet
    assert repr(pipe).splitlines()[0] == "StableDiffusionPipeline:"
    assert "unet: UNet2DConditionModel" in repr(pipe)


def test_a_checker_needs_its_eyes(pipe):
    with pytest.raises(ValueError, match="safety_checker needs feature_extractor"):
        StableDiffusionPipeline(**{**pipe.components, "safety_checker": tiny.safety_checker()})


def test_text_is_masked_where_the_encoder_asks_for_it(pipe):
    expected = draw(pipe)
    asking = type(pipe.text_encoder).from_config(pipe.text_encoder.config, use_attention_mask=True)
    asking.load_state_dict(pipe.text_encoder.state_dict())
    pipe.text_encoder = asking.eval()
    assert not torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("kind", ["plain", "cast", "offloaded"])
def test_a_deep_copy_is_a_pipeline_of_its_own(pipe, kind):
    if kind == "cast":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn)
    if kind == "offloaded":
        pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.stages.observers.append(object())
    other, expected = copy.deepcopy(pipe), None
    pipe.stages.observers.clear()
    expected = draw(pipe)
    assert other.stages.observers == []
    assert torch.equal(draw(other), expected)
    copied = []

    def call_the_other(its_pipe, step, _timestep, _tensors):
        if step == 0:
            copied.extend([copy.deepcopy(its_pipe), draw(other)])

    assert torch.equal(draw(pipe, callback_on_step_end=call_the_other), expected)
    assert torch.equal(copied[1], expected)
    assert torch.equal(draw(copied[0]), expected)  # it was copied in the middle of a call
    with torch.no_grad():
        other.unet.conv_out = nn.Conv2d(8, 4, 3, padding=1)
    assert torch.equal(draw(pipe), expected)
