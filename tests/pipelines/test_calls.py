"""What a call does: sizes, seeds, batches, prompts, callbacks, outputs, and the stages it goes through."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny
from tests.fitting import fits
from tests.thinned import thinned

from lowtide.pipelines.pipeline_outputs import StableDiffusionPipelineOutput


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return fits.small(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """With a safety checker that finds something in some pictures."""
    return fits.small(tmp_path_factory.mktemp("guarded"), checker=True)


def draw(pipe, *seeds, **call):
    generator = tiny.seeded(*(seeds or (0,)))
    defaults = {"prompt": "a boat", "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
    return pipe(**{**defaults, "generator": generator, **call}).images


class Listener:
    def __init__(self):
        self.heard = []

    def stage_started(self, name, steps):
        self.heard.append((name, steps))

    def step_done(self, name, step):
        self.heard.append((name, "step", step))

    def stage_finished(self, name):
        self.heard.append((name, "end"))


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (32, 32)),
        ({"height": 16}, (16, 32)),
        ({"width": 48}, (32, 48)),
        ({"height": 20, "width": 12}, (20, 12)),
        ({"height": 4, "width": 4}, (4, 4)),
    ],
)
def test_sizes(pipe, asked, size):
    (picture,) = pipe("a boat", num_inference_steps=1, **asked).images
    assert (picture.height, picture.width) == size


def test_default_sizes_are_the_models_own(tmp_path):
    for sample_size, size in ((6, (24, 24)), ([4, 6], (16, 24)), (None, (256, 256))):
        pipe = fits.small(tmp_path, unet=tiny.unet(**fits.UNET, sample_size=sample_size))
        assert pipe.image_size(None, None) == size


def test_output_types(pipe):
    pictures = {kind: draw(pipe, 3, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert isinstance(pictures["pil"][0], Image.Image)
    assert isinstance(pictures["np"], np.ndarray)
    assert pictures["np"].dtype == np.float32
    assert pictures["np"].shape == (1, 16, 16, 3)
    assert pictures["pt"].shape == (1, 3, 16, 16)
    assert pictures["latent"].shape == (1, 4, 4, 4)
    assert 0 <= pictures["pt"].min() < pictures["pt"].max() <= 1
    assert np.array_equal(pictures["np"], pictures["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pictures["pil"][0]), (pictures["np"][0] * 255).round().astype(np.uint8))
    with torch.no_grad():
        assert torch.equal(pipe.decode_latents(pictures["latent"]), pictures["pt"])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_tuple_on_request(pipe, output_type):
    call = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": output_type}
    whole = pipe("a boat", **call, generator=tiny.seeded(1))
    images, unsafe = pipe("a boat", **call, generator=tiny.seeded(1), return_dict=False)
    assert isinstance(whole, StableDiffusionPipelineOutput)
    assert whole.nsfw_content_detected is None
    assert unsafe is None
    assert np.array_equal(np.asarray(images[0]), np.asarray(whole.images[0]))


def test_a_seed_means_one_picture(pipe):
    assert torch.equal(draw(pipe, 1), draw(pipe, 1))
    assert not torch.equal(draw(pipe, 1), draw(pipe, 2))
    generator = tiny.seeded(1)
    first, second = (draw(pipe, generator=generator) for _ in range(2))
    assert torch.equal(first, draw(pipe, 1))
    assert not torch.equal(first, second)  # it goes on where it was


def test_without_a_generator_each_picture_is_another(pipe):
    assert not torch.equal(draw(pipe, generator=None), draw(pipe, generator=None))


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_a_picture_alone_is_the_one_in_the_batch(tmp_path, name):
    """With a generator each. On a CPU a batch may sum in another order: equal to a few of the last bits, not all."""
    pipe = fits.small(tmp_path, schedule=tiny.scheduler(name))
    prompts = ["a boat", "sea", "night"]
    together = draw(pipe, 4, 5, 6, prompt=prompts)
    for i, prompt in enumerate(prompts):
        alone = draw(pipe, 4 + i, prompt=prompt)
        assert (together[i] - alone[0]).abs().max() < 1e-4
        assert (together[i] - draw(pipe, 9, prompt=prompt)[0]).abs().max() > 0.05  # negative control
    assert torch.equal(together, draw(pipe, 4, 5, 6, prompt=prompts))


def test_several_pictures_of_each_prompt_come_prompt_by_prompt(pipe):
    many = draw(pipe, 1, 2, 3, 4, prompt=["a boat", "sea"], num_images_per_prompt=2)
    for i, (prompt, seed) in enumerate([("a boat", 1), ("a boat", 2), ("sea", 3), ("sea", 4)]):
        assert (many[i] - draw(pipe, seed, prompt=prompt)[0]).abs().max() < 1e-4


def test_one_negative_prompt_serves_all(pipe):
    prompts = ["a boat", "sea"]
    one = draw(pipe, 1, 2, prompt=prompts, negative_prompt="fog")
    # kernels may round a row otherwise beside others
    assert (one - draw(pipe, 1, 2, prompt=prompts, negative_prompt=["fog", "fog"])).abs().max() < 1e-4
    assert torch.equal(one, draw(pipe, 1, 2, prompt=prompts, negative_prompt=["fog"]))
    assert (one - draw(pipe, 1, 2, prompt=prompts, negative_prompt=["fog", ""])).abs().max() > 1e-3
    assert torch.equal(draw(pipe, negative_prompt=""), draw(pipe))


def test_guidance(pipe):
    plain = draw(pipe, guidance_scale=1.0, negative_prompt="fog")
    assert torch.equal(plain, draw(pipe, guidance_scale=0.0))
    assert not torch.equal(plain, draw(pipe, guidance_scale=3.0))
    assert (plain - draw(pipe, guidance_scale=1.0001)).abs().max() < 0.01


def test_latents_and_embeddings_given_are_those_made_inside(pipe):
    noise = torch.randn(1, 4, 4, 4, generator=tiny.seeded(3))
    assert torch.equal(draw(pipe, 3), draw(pipe, 8, latents=noise))
    with torch.no_grad():
        negative, positive = pipe.encode_prompt("a boat", negative_prompt="fog").chunk(2)
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(draw(pipe, negative_prompt="fog"), draw(pipe, **embeds))
    assert torch.equal(
        draw(pipe, 1, 2, num_images_per_prompt=2),
        draw(pipe, 1, 2, **embeds | {"negative_prompt_embeds": None}, num_images_per_prompt=2),
    )


def test_latents_given_are_not_changed(pipe):
    noise = tiny.numbers((1, 4, 4, 4))
    draw(pipe, latents=noise)
    assert torch.equal(noise, tiny.numbers((1, 4, 4, 4)))


@pytest.mark.parametrize("prompt", ["", " ", "Öl ⛵", "静か", "a\nb\tc", "\u0000", "A BOAT"])
def test_any_text_is_a_prompt(pipe, prompt):
    picture = draw(pipe, prompt=prompt)
    assert picture.isfinite().all()
    if prompt != "A BOAT":
        assert not torch.equal(picture, draw(pipe))
    else:  # the vocabulary knows small letters only
        assert torch.equal(picture, draw(pipe))


def test_a_prompt_too_long_is_cut_with_a_warning(pipe, capsys):
    long = "the sea boat "  # the, sea, boat: letters and four merges
    with pytest.warns(UserWarning, match="The model reads 14 tokens; of this prompt it ignores '.*boat") as caught:
        cut = draw(pipe, prompt=long * 6)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert capsys.readouterr().err == ""
    with pytest.warns(UserWarning, match="ignores"):
        assert torch.equal(cut, draw(pipe, prompt=long * 7))
    ids = pipe.tokenizer("b" * 50).input_ids
    assert len(ids) == 52
    with pytest.warns(UserWarning, match="ignores 'b{36}'"):
        draw(pipe, prompt="b" * 50)


def test_a_prompt_just_short_enough_is_not_warned_of(pipe):
    ids = pipe.tokenizer("b" * 14).input_ids
    assert len(ids) == 16
    draw(pipe, prompt="b" * 14)


STEPS = {
    "DDIMScheduler": 4,
    "PNDMScheduler": 5,
    "UniPCMultistepScheduler": 4,
    "EulerDiscreteScheduler": 4,
    "DPMSolverMultistepScheduler": 4,
}


@pytest.mark.parametrize("name", tiny.SCHEDULERS)
def test_stages_in_their_order(tmp_path, name):
    pipe, listener = fits.small(tmp_path, schedule=tiny.scheduler(name)), Listener()
    with pipe.stages.observed(listener):
        draw(pipe, num_inference_steps=4)
    steps = STEPS[name]
    assert listener.heard == [
        ("encode prompt", None),
        ("encode prompt", "end"),
        ("denoise", steps),
        *(("denoise", "step", step) for step in range(1, steps + 1)),
        ("denoise", "end"),
        ("decode", None),
        ("decode", "end"),
    ]


def test_stages_with_a_checker_and_without_decoding(guarded):
    listener = Listener()
    with guarded.stages.observed(listener):
        draw(guarded, num_inference_steps=1, output_type="latent")
        names = [event[0] for event in listener.heard if event[1] == "end"]
        assert names == ["encode prompt", "denoise"]
        guarded.safety_checker.concept_embeds_weights.data.fill_(2.0)
        draw(guarded, num_inference_steps=1)
    names = [event[0] for event in listener.heard if event[1] == "end"]
    assert names[2:] == ["encode prompt", "denoise", "decode", "safety check"]


def test_flagged_pictures_are_blackened_and_told(tmp_path):
    pipe = fits.small(tmp_path, checker=True)
    call = {
        "prompt": ["a boat", "sea", "night", "fog"],
        "generator": None,
        "latents": 2 * tiny.numbers((4, 4, 4, 4), 1),
    }
    bare = pipe.safety_checker
    pipe.safety_checker = None
    seen = draw(pipe, **call)
    pipe.safety_checker = bare
    pictures = pipe.feature_extractor(
        [Image.fromarray(p) for p in (seen.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()],
        return_tensors="pt",
    ).pixel_values
    embeds = bare.visual_projection(bare.vision_model(pictures).pooler_output)
    nearest = torch.cosine_similarity(embeds[:, None], bare.concept_embeds[None], dim=2).max(dim=1).values
    bare.special_care_embeds_weights.data.fill_(2.0)
    bare.concept_embeds_weights.data.fill_(float(nearest.sort().values[1:3].mean()))
    with pytest.warns(UserWarning, match="The safety checker blackened a picture") as caught:
        output = pipe(**{"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt", **call})
    assert caught[0].filename == __file__
    assert sum(output.nsfw_content_detected) == 2
    for picture, clean, flagged in zip(output.images, seen, output.nsfw_content_detected, strict=True):
        assert torch.equal(picture, torch.zeros_like(picture) if flagged else clean)


def test_a_callback_sees_every_step_and_may_change_it(pipe):
    seen = []

    def look(its_pipe, step, timestep, tensors):
        assert its_pipe is pipe
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))

    every = ("latents", "prompt_embeds", "noise_pred")
    plain = draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=every, num_inference_steps=3)
    assert torch.equal(plain, draw(pipe, num_inference_steps=3))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    shapes = {"latents": (1, 4, 4, 4), "prompt_embeds": (2, 16, 24), "noise_pred": (1, 4, 4, 4)}
    assert all(got == shapes for _, _, got in seen)


def test_a_callback_changes_latents_and_embeddings(pipe):
    def blank(_pipe, step, _timestep, tensors):
        assert tensors.keys() == {"latents"}
        return {"latents": torch.zeros_like(tensors["latents"])}

    def turn(_pipe, step, _timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}

    assert not draw(pipe, callback_on_step_end=blank, output_type="latent").any()
    turned = draw(pipe, callback_on_step_end=turn, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not torch.equal(turned, draw(pipe))


@pytest.mark.parametrize(("name", "error"), thinned(tiny.SCHEDULERS, [RuntimeError, KeyboardInterrupt]))
def test_after_an_exception_all_is_as_before(tmp_path, error, name):
    pipe, listener = fits.small(tmp_path, schedule=tiny.scheduler(name)), Listener()
    expected = draw(pipe, num_inference_steps=4)
    pipe.stages.observers.append(listener)

    def stop(_pipe, step, _timestep, _tensors):
        if step == 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        draw(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert pipe.stages.observers == [listener]
    assert listener.heard[-2:] == [("denoise", "step", 2), ("denoise", "end")]
    assert torch.is_grad_enabled()
    assert torch.equal(draw(pipe, num_inference_steps=4), expected)


def test_progress_is_shown_and_can_be_silenced(tmp_path, capsys):
    pipe = fits.small(tmp_path)
    draw(pipe)
    assert capsys.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in ("encode prompt", "denoise", "2/2", "decode"):
        assert word in shown.err


def test_nothing_keeps_a_graph(pipe):
    assert not draw(pipe).requires_grad
    assert not draw(pipe, output_type="latent").requires_grad
