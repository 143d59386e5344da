"""What a call for a clip refuses, and how it says so; nothing has been done by then."""

import pytest
import torch
from tests import tiny, tiny_video

WIDTH, TOKENS = tiny_video.TEXT_WIDTH, tiny_video.MAX_TOKENS


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_video.pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A model with positions for ten tokens and no other number."""
    return tiny_video.pipeline(tmp_path_factory.mktemp("fixed"), "2b")


CALL = {"prompt": "a panda", "num_inference_steps": 1, "max_sequence_length": TOKENS}
EMBEDS = tiny.numbers((2, TOKENS, WIDTH))
NO_TEXT = {"prompt": None, "prompt_embeds": EMBEDS}
BAD = {
    "no prompt": ({"prompt": None}, "Neither prompt nor prompt_embeds is given; give one of them"),
    "two prompts": ({"prompt_embeds": EMBEDS}, "prompt and prompt_embeds are both given; give one of them"),
    "empty list": ({"prompt": []}, "prompt must be a text or a list of texts"),
    "number as prompt": ({"prompt": 3}, "prompt must be a text or a list of texts"),
    "number to avoid": ({"negative_prompt": 3}, "negative_prompt must be a text or a list of texts"),
    "two to avoid": (
        {"negative_prompt": "x", "negative_prompt_embeds": EMBEDS},
        "negative_prompt and negative_prompt_embeds are both given",
    ),
    "three to avoid": ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts; give one for all, or"),
    "embeddings of three to avoid": (
        {**NO_TEXT, "negative_prompt_embeds": tiny.numbers((3, TOKENS, WIDTH))},
        "3 negative prompts for 2 prompts",
    ),
    "flat embeddings": ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"prompt_embeds must be a tensor \[batch, token"),
    "narrow embeddings": (
        {"prompt": None, "prompt_embeds": EMBEDS[..., :9]},
        r"prompt_embeds \[2, 10, 9\] do not fit: the transformer reads \[batch, tokens, 16\]",
    ),
    "narrow embeddings to avoid": (
        {"negative_prompt_embeds": EMBEDS[..., :9]},
        r"negative_prompt_embeds \[2, 10, 9\] do not fit",
    ),
    "embeddings of other lengths": (
        {**NO_TEXT, "negative_prompt_embeds": EMBEDS[:, :7]},
        "Negative prompts of 7 tokens do not fit prompts of 10",
    ),
    "text to avoid of another length": (
        {"prompt": None, "prompt_embeds": EMBEDS[:, :7]},
        "Negative prompts of 10 tokens do not fit prompts of 7: give embeddings of one length, or of the length that",
    ),
    "height of 40": ({"height": 40}, "height=40 is not possible: it must be a multiple of 16; try 32"),
    "width of 0": ({"width": 0}, "width=0 is not possible: it must be a multiple of 16; try 16"),
    "fractional width": ({"width": 48.0}, "width=48.0 is not possible.*try 48"),
    "no frames": ({"num_frames": 0}, "num_frames=0 is not possible: it must be a whole number, at least 1"),
    "fractional frames": ({"num_frames": 9.0}, "num_frames=9.0 is not possible"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0 is not possible: it must be a whole number"),
    "no clips": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0 is not possible"),
    "true clips": ({"num_videos_per_prompt": True}, "num_videos_per_prompt=True is not possible"),
    "no tokens": ({"max_sequence_length": 0}, "max_sequence_length=0 is not possible"),
    "timesteps": ({"timesteps": [900, 500, 100]}, "timesteps is not possible: a CogVideoXDDIMScheduler lays out its o"),
    "adapters": (
        {"attention_kwargs": {"scale": 0.5}},
        r"attention_kwargs=.*'scale': 0.5.* is not possible: they are for adapters",
    ),
    "output type": ({"output_type": "mp4"}, "output_type='mp4' is not possible; choose one of pil, np, pt, latent"),
    "file": ({"output_type": "file"}, "output_type='file' is not possible"),
    "seed as generator": ({"generator": 7}, "generator must be a torch.Generator or a list of them, not 7"),
    "two generators for one": ({"generator": tiny.seeded(1, 2)}, "2 generators were given for a batch of 1"),
    "generators of one prompt": (
        {"generator": tiny.seeded(1, 2, 3), "prompt": ["a", "b"], "num_videos_per_prompt": 2},
        "3 generators were given for a batch of 4",
    ),
    "shape of latents": (
        {"latents": tiny.numbers((1, 4, 3, 4, 6))},
        r"latents \[1, 4, 3, 4, 6\] do not fit: these clips need \[1, 3, 4, 4, 6\]",
    ),
    "number of latents": ({"latents": tiny.numbers((2, 3, 4, 4, 6))}, r"need \[1, 3, 4, 4, 6\]"),
    "list of latents": ({"latents": [1.0]}, r"latents must be a tensor \[1, 3, 4, 4, 6\], not list"),
    "text as guidance": ({"guidance_scale": "6"}, "guidance_scale='6' is not possible: it must be a finite number"),
    "no guidance": ({"guidance_scale": None}, "guidance_scale=None is not possible"),
    "guidance of NaN": ({"guidance_scale": float("nan")}, "guidance_scale=nan is not possible"),
    "endless guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf is not possible"),
    "no rows": (
        {"prompt": None, "prompt_embeds": torch.empty((0, TOKENS, WIDTH))},
        r"prompt_embeds \[0, 10, 16\] hold nothing: there must be at least one row",
    ),
    "callback's tensors": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]},
        r"\['noise_pred'\] is not possible; choose from latents, prompt_embeds, negative_prompt_embeds",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_refused_before_any_work(pipe, name, monkeypatch):
    arguments, message = BAD[name]
    monkeypatch.setattr(pipe, "running", None)
    with pytest.raises(ValueError, match=message):
        pipe(**{**CALL, **arguments})
    assert pipe.stages.observers == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DDIMScheduler", {"eta": 2.0}, "eta=2.0 is not possible"),
        ("CogVideoXDDIMScheduler", {"num_inference_steps": 1001}, "1001"),
    ],
)
def test_what_the_scheduler_refuses(pipe, name, arguments, message, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", tiny_video.scheduler(name))
    with pytest.raises(ValueError, match=message):
        pipe(**{**CALL, **arguments})
    assert pipe.stages.observers == []
    assert torch.is_grad_enabled()


FIXED = {
    "length of text": ({"max_sequence_length": 9}, "max_sequence_length=9 is not possible: this model reads 10 tokens"),
    "the usual length": ({"max_sequence_length": 226}, "max_sequence_length=226 is not possible"),
    "length of embeddings": (
        {"prompt": None, "prompt_embeds": EMBEDS[:, :9], "guidance_scale": 1.0},
        r"prompt_embeds \[2, 9, 16\] do not fit: the transformer reads \[batch, 10, 16\]",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_model_with_positions_for_so_many_tokens(fixed, pipe, name, monkeypatch):
    arguments, message = FIXED[name]
    call = {**CALL, **arguments, "output_type": "latent"}
    assert pipe(**call).frames.isfinite().all()  # rotary positions are for frames alone
    monkeypatch.setattr(fixed, "running", None)
    with pytest.raises(ValueError, match=message):
        fixed(**call)


def test_sizes_that_version_1_5_has_no_positions_for(tmp_path, monkeypatch):
    pipe = tiny_video.pipeline(tmp_path, "1.5")
    assert pipe(**CALL, height=16, output_type="latent").frames.isfinite().all()
    monkeypatch.setattr(pipe, "running", None)
    with pytest.raises(ValueError, match="Latents of 6x6 are larger than the 4x6 that the model knows positions for"):
        pipe(**CALL, height=48)


def test_the_same_call_without_the_fault_works(pipe):
    """Negative control."""
    assert len(pipe(**CALL).frames) == 1
    assert len(pipe(**CALL, attention_kwargs={}, timesteps=None).frames) == 1


@pytest.mark.parametrize("missing", ["text_encoder", "tokenizer"])
def test_without_a_part_that_reads_text(pipe, missing):
    bare = type(pipe)(**{**pipe.components, missing: None})
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=f"has no {missing} to read text with: give prompt_embeds"):
        bare(**CALL)
    with pytest.raises(ValueError, match=f"has no {missing} to read text with: give negative_prompt_embeds"):
        bare(**{**CALL, **NO_TEXT})
    call = {**CALL, **NO_TEXT, "output_type": "pt", "negative_prompt_embeds": EMBEDS.flip(0)}
    clips = [one(**call, generator=tiny.seeded(4)).frames for one in (bare, pipe)]
    assert torch.equal(*clips)


def test_timesteps_are_given_to_a_scheduler_that_takes_them(pipe, monkeypatch):
    whole, asked = pipe.scheduler.set_timesteps, []

    def take(num_inference_steps=None, device=None, timesteps=None):
        asked.append(timesteps)
        whole(num_inference_steps or len(timesteps), device=device)

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", take)
    pipe(**CALL, timesteps=(900, 100), output_type="latent")
    pipe(**CALL, output_type="latent")
    assert asked == [[900, 100], [900, 100], None]  # the first to count the steps


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            torch.ones(2),
            TypeError,
            "returned a Tensor; .* by name: latents, prompt_embeds, negative_prompt_embeds",
        ),
        (["latents"], TypeError, "returned a list"),
        (
            {"latent": None},
            ValueError,
            r"returned \['latent'\]; it may change latents, prompt_embeds, negative_prompt_embeds",
        ),
    ],
)
def test_what_a_callback_cannot_return(pipe, returned, error, message):
    with pytest.raises(error, match=message):
        pipe(**CALL, callback_on_step_end=lambda *_: returned)
    assert pipe.stages.observers == []


def test_a_callback_cannot_return_another_number_of_embeddings(pipe):
    def end(_pipe, _step, _timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"][:1].expand(3, -1, -1)}

    call = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="3 prompt_embeds for 1 latents; it must be 2, or 1 to end the guidance"):
        pipe(**CALL, **call)
