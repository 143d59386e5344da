"""What a call refuses, and how it says so: what was asked, and what is possible; and nothing has been done by then."""

import pytest
import torch
from tests import tiny

from lowtide.pipelines.checks import count_steps


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("pipe"))


EMBEDS = tiny.numbers((2, 16, 24))
BAD = {
    "no prompt": ({"prompt": None}, "Neither prompt nor prompt_embeds is given; give one of them"),
    "two prompts": ({"prompt_embeds": EMBEDS}, "prompt and prompt_embeds are both given; give one of them"),
    "empty list": ({"prompt": []}, "prompt must be a text or a list of texts"),
    "number as prompt": ({"prompt": 3}, "prompt must be a text or a list of texts .at least one., not 3"),
    "number in the list": ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts"),
    "dictionary as prompt": ({"prompt": {"a": 1}}, "prompt must be a text"),
    "number to avoid": ({"negative_prompt": 3}, "negative_prompt must be a text or a list of texts"),
    "two to avoid": (
        {"negative_prompt": "x", "negative_prompt_embeds": EMBEDS},
        "negative_prompt and negative_prompt_embeds are both given",
    ),
    "three to avoid": ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 1 prompts; give one for all, or"),
    "flat embeddings": (
        {"prompt": None, "prompt_embeds": EMBEDS[0]},
        r"prompt_embeds must be a tensor \[batch, tokens",
    ),
    "list as embeddings": ({"prompt": None, "prompt_embeds": [[[1.0]]]}, "prompt_embeds must be a tensor"),
    "narrow embeddings": (
        {"prompt": None, "prompt_embeds": EMBEDS[..., :20]},
        r"prompt_embeds \[2, 16, 20\] do not fit: the U-Net reads \[batch, tokens, 24\]",
    ),
    "narrow embeddings to avoid": (
        {"negative_prompt_embeds": EMBEDS[..., :20]},
        r"negative_prompt_embeds \[2, 16, 20\] do not fit",
    ),
    "short embeddings": (
        {"prompt": None, "prompt_embeds": EMBEDS[:, :9]},
        "Negative prompts of 16 tokens do not fit prompts of 9: give embeddings of one length",
    ),
    "height of 20": ({"height": 21}, "height=21 is not possible: it must be a multiple of 4; try 20"),
    "width of 0": ({"width": 0}, "width=0 is not possible: it must be a multiple of 4; try 4"),
    "negative width": ({"width": -8}, "width=-8 is not possible"),
    "fractional height": ({"height": 32.0}, "height=32.0 is not possible.*try 32"),
    "size as text": ({"height": "32"}, "height='32' is not possible"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0 is not possible: it must be a whole number"),
    "fractional steps": ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is not possible"),
    "too many steps": ({"num_inference_steps": 1001}, "1001"),
    "no pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 is not possible"),
    "true pictures": ({"num_images_per_prompt": True}, "num_images_per_prompt=True is not possible"),
    "output type": ({"output_type": "jpeg"}, "output_type='jpeg' is not possible; choose one of pil, np, pt, latent"),
    "seed as generator": ({"generator": 7}, "generator must be a torch.Generator or a list of them, not 7"),
    "seeds as generators": ({"generator": [7, 8]}, "generator must be a torch.Generator or a list of them"),
    "two generators for one": ({"generator": tiny.seeded(1, 2)}, "2 generators were given for a batch of 1"),
    "shape of latents": (
        {"latents": tiny.numbers((1, 4, 8, 9))},
        r"latents \[1, 4, 8, 9\] do not fit: these pictures need \[1, 4, 8, 8\]",
    ),
    "number of latents": ({"latents": tiny.numbers((2, 4, 8, 8))}, r"need \[1, 4, 8, 8\]"),
    "eta": ({"eta": 2.0}, "eta=2.0 is not possible"),
    "text as guidance": ({"guidance_scale": "6"}, "guidance_scale='6' is not possible: it must be a finite number"),
    "no guidance": ({"guidance_scale": None}, "guidance_scale=None is not possible"),
    "guidance of NaN": ({"guidance_scale": float("nan")}, "guidance_scale=nan is not possible"),
    "endless guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf is not possible"),
    "no rows": (
        {"prompt": None, "prompt_embeds": torch.empty((0, 16, 24))},
        r"prompt_embeds \[0, 16, 24\] hold nothing: there must be at least one row",
    ),
    "callback's tensors": (
        {"callback_on_step_end_tensor_inputs": ["latents", "image"]},
        r"callback_on_step_end_tensor_inputs=\['image'\] is not possible; choose from latents, prompt_embeds, noise_p",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument(pipe, name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a boat", "num_inference_steps": 2, **arguments})
    assert pipe.stages.observers == []
    assert torch.is_grad_enabled()


EARLY = sorted(BAD.keys() - {"three to avoid", "short embeddings", "too many steps", "two generators for one", "eta"})


@pytest.mark.parametrize("name", [name for name in EARLY if "latents" not in name])
def test_what_can_be_known_beforehand_is_refused_before_any_work(pipe, name, monkeypatch):
    monkeypatch.setattr(pipe, "running", None)
    with pytest.raises(ValueError, match=BAD[name][1]):
        pipe(**{"prompt": "a boat", "num_inference_steps": 2, **BAD[name][0]})


REFUSED = {
    "sigmas without a flow": ("UniPCMultistepScheduler", {"sigmas": [0.9, 0.5]}, "only with use_flow_sigmas=True"),
    "rising sigmas": ("EulerDiscreteScheduler", {"sigmas": [9.0, -1.0, 0.0]}, "all above 0 but the last"),
    "timesteps too large": ("DPMSolverMultistepScheduler", {"timesteps": [1500, 3]}, "within 0…999"),
    "sigmas of no use": ("DDIMScheduler", {"sigmas": [9.0, 0.0]}, "DDIMScheduler lays out its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_scheduler_refuses_is_refused_before_any_work(pipe, name, monkeypatch):
    scheduler, told, message = REFUSED[name]
    monkeypatch.setattr(pipe, "scheduler", tiny.scheduler(scheduler))
    monkeypatch.setattr(pipe, "running", None)
    with pytest.raises(ValueError, match=message):
        pipe("a boat", **told)


@pytest.mark.parametrize(("scheduler", "end"), [("EulerDiscreteScheduler", [0.0]), ("UniPCMultistepScheduler", [])])
def test_the_steps_of_sigmas_are_counted(pipe, scheduler, end, monkeypatch):
    """For Euler the last one is the end, and no step."""
    flow = {} if end else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    monkeypatch.setattr(pipe, "scheduler", tiny.scheduler(scheduler, **flow))
    for sigmas in ([0.9, 0.5], [0.9, 0.5, 0.2]):
        pipe("a boat", sigmas=[*sigmas, *end], output_type="latent")
        assert pipe.num_timesteps == len(sigmas)
        assert count_steps(pipe.scheduler, 50, None, [*sigmas, *end]) == len(sigmas)


def test_the_same_call_without_the_fault_works(pipe):
    """Negative control."""
    assert len(pipe("a boat", num_inference_steps=2).images) == 1


def test_a_device_that_is_not_there(pipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for target in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"is not possible: PyTorch sees no CUDA devices here. Use 'cpu'"):
            pipe.to(target)
    assert pipe.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            torch.ones(2),
            TypeError,
            "returned a Tensor; .* by name: latents, prompt_embeds, noise_pred",
        ),
        (["latents"], TypeError, "returned a list"),
        ({"latent": None}, ValueError, r"returned \['latent'\]; it may change latents, prompt_embeds, noise_pred"),
    ],
)
def test_what_a_callback_cannot_return(pipe, returned, error, message):
    with pytest.raises(error, match=message):
        pipe(prompt="a boat", num_inference_steps=2, callback_on_step_end=lambda *_: returned)
    assert pipe.stages.observers == []
