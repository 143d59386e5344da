"""Options of ours as arguments of other pipelines' calls: the table of names, and what is told of wrong ones."""

import inspect

import pytest

from lowtide.guests.asked import call_arguments, frame_rate, hint_for, makes_clips, own_names


def pictures(
    prompt=None, height=None, width=None, num_inference_steps=28, guidance_scale=3.5, true_cfg_scale=1.0,
    negative_prompt=None, num_images_per_prompt=1, generator=None, latents=None, prompt_embeds=None, strength=0.8,
    image=None, return_dict=True, callback_on_step_end=None,
):  # fmt: skip
    ...


def guided_by_the_other(guidance_scale=None, true_cfg_scale=4.0): ...


def clips(image, num_frames=81, num_videos_per_prompt=1, frame_rate=25.0, **kwargs): ...


def arguments(of, options=None, settings=None):
    return call_arguments("APipeline", inspect.signature(of), options or {}, settings or {}, lacking=("--batch",))


def test_every_option_has_its_name():
    options = {
        "PROMPT": "a boat", "--negative": "fog", "--size": (64, 48), "--steps": 4, "--guidance": 5.0, "--count": 2,
        "--image": "a picture",
    }  # fmt: skip
    assert arguments(pictures, options, {"strength": 0.6}) == {
        "prompt": "a boat",
        "negative_prompt": "fog",
        "width": 64,
        "height": 48,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "num_images_per_prompt": 2,
        "image": "a picture",
        "strength": 0.6,
    }
    assert arguments(clips, {"--frames": 9, "--count": 3}) == {"num_frames": 9, "num_videos_per_prompt": 3}


def test_of_two_names_the_one_counts_that_has_a_value():
    assert own_names("--guidance", inspect.signature(pictures)) == ("guidance_scale",)
    assert arguments(guided_by_the_other, {"--guidance": 3.0}) == {"true_cfg_scale": 3.0}


def test_what_has_no_name_is_told_with_what_has_one():
    with pytest.raises(ValueError, match=r"^APipeline takes no --frames") as caught:
        arguments(pictures, {"--frames": 9})
    told = str(caught.value)
    assert told == (
        "APipeline takes no --frames. It takes --negative, --size, --steps, --guidance, --count, --seed, --image, and "
        "with --set NAME=VALUE true_cfg_scale, strength."
    )


@pytest.mark.parametrize("name", ["strenght", "generator", "latents", "prompt_embeds", "return_dict", "kwargs"])
def test_other_names_are_those_of_the_call_that_can_be_typed(name):
    for of in (pictures, clips):
        with pytest.raises(ValueError, match=f"^{name}: a call of APipeline takes no such argument. It takes "):
            arguments(of, {}, {name: 1})


def test_what_is_asked_twice():
    with pytest.raises(ValueError, match="num_inference_steps is given by --steps and by its own name"):
        arguments(pictures, {"--steps": 4}, {"num_inference_steps": 5})


def test_what_a_call_makes():
    of_pictures, of_clips = inspect.signature(pictures), inspect.signature(clips)
    assert (makes_clips(of_pictures), makes_clips(of_clips)) == (False, True)
    assert (frame_rate(of_pictures, {}), frame_rate(of_clips, {}), frame_rate(of_clips, {"frame_rate": 8})) == (
        None,
        25,
        8,
    )
    assert "--image" in hint_for(of_clips, {})
    assert hint_for(of_clips, {"image": 1}) == hint_for(inspect.signature(guided_by_the_other), {}) == ""
