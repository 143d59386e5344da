"""What a call for a clip does: sizes, seeds, batches, prompts, callbacks, outputs, and the stages it goes through."""

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny, tiny_video

from lowtide.activations.frame_cache import frames_made
from lowtide.pipelines.cogvideox import dynamic_guidance
from lowtide.pipelines.pipeline_outputs import CogVideoXPipelineOutput

SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_video.pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(params=SCHEDULERS)
def each(request, tmp_path):
    """A pipeline with each scheduler."""
    return tiny_video.pipeline(tmp_path, schedule=tiny_video.scheduler(request.param))


def film(pipe, *seeds, **call):
    return pipe(**{**DEFAULTS, "generator": tiny.seeded(*(seeds or (0,))), **call}).frames


DEFAULTS = {
    "prompt": "a panda",
    "num_inference_steps": 2,
    "height": 16,
    "width": 32,
    "num_frames": 9,
    "output_type": "pt",
    "max_sequence_length": tiny_video.MAX_TOKENS,
}


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
        ({"height": None, "width": None, "num_frames": None}, (9, 32, 48)),
        ({}, (9, 16, 32)),
        ({"num_frames": 1}, (1, 16, 32)),
        ({"num_frames": 8}, (8, 16, 32)),
        ({"num_frames": 17, "height": 32}, (17, 32, 32)),
    ],
)
def test_sizes(pipe, asked, size):
    frames, height, width = size
    assert film(pipe, **asked).shape == (1, frames, 3, height, width)


@pytest.mark.parametrize(("asked", "made"), [(2, 1), (5, 8), (10, 9), (13, 16), (19, 17)])
def test_another_number_of_frames_is_told(pipe, asked, made):
    with pytest.warns(UserWarning, match=f"num_frames={asked} is not possible: .* there will be {made}") as caught:
        clip = film(pipe, num_frames=asked, num_inference_steps=1)
    assert clip.shape[1] == made
    assert caught[0].filename == __file__


def test_frames_that_are_made():
    assert [frames_made(latents, 2, 4) for latents in (1, 2, 3, 12, 13, 21)] == [1, 8, 9, 48, 49, 81]
    assert frames_made(7, 7, 4) == 25
    assert frames_made(6, 3, 4) == 18
    assert frames_made(5, 2, 1) == 5


def test_a_batch_of_another_size_makes_what_it_makes(tmp_path):
    pipe = tiny_video.pipeline(tmp_path)
    for size in (1, 2, 3):
        pipe.vae.num_latent_frames_batch_size = size
        made = frames_made(3, size, 4)
        if made == 9:
            assert film(pipe).shape[1] == 9
        else:
            with pytest.warns(UserWarning, match=f"there will be {made}"):
                assert film(pipe).shape[1] == made


def test_output_types(pipe):
    clips = {kind: film(pipe, 3, 4, output_type=kind, prompt=["a", "b"]) for kind in ("pil", "np", "pt", "latent")}
    assert [len(clip) for clip in clips["pil"]] == [9, 9]
    assert isinstance(clips["pil"][1][8], Image.Image)
    assert clips["pil"][0][0].size == (32, 16)
    assert isinstance(clips["np"], np.ndarray)
    assert clips["np"].dtype == np.float32
    assert clips["np"].shape == (2, 9, 16, 32, 3)
    assert clips["pt"].shape == (2, 9, 3, 16, 32)
    assert clips["latent"].shape == (2, 3, 4, 2, 4)
    assert 0 <= clips["pt"].min() < clips["pt"].max() <= 1
    assert np.array_equal(clips["np"], clips["pt"].permute(0, 1, 3, 4, 2).numpy())
    rounded = (clips["np"] * 255).round().astype(np.uint8)
    assert np.array_equal(np.array([[np.asarray(frame) for frame in clip] for clip in clips["pil"]]), rounded)
    with torch.no_grad():
        assert torch.equal(pipe.decode_latents(clips["latent"]), clips["pt"])
    assert not torch.equal(clips["pt"][0], clips["pt"][1])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_tuple_on_request(pipe, output_type):
    call = {**DEFAULTS, "output_type": output_type}
    whole = pipe(**call, generator=tiny.seeded(1))
    (frames,) = pipe(**call, generator=tiny.seeded(1), return_dict=False)
    assert isinstance(whole, CogVideoXPipelineOutput)
    assert whole[0] is whole.frames
    assert whole["frames"] is whole.frames
    assert np.array_equal(np.asarray(frames[0][0]), np.asarray(whole.frames[0][0]))


def test_a_seed_means_one_clip(each):
    assert torch.equal(film(each, 1), film(each, 1))
    assert not torch.equal(film(each, 1), film(each, 2))
    generator = tiny.seeded(1)
    first, second = (film(each, generator=generator) for _ in range(2))
    assert torch.equal(first, film(each, 1))
    assert not torch.equal(first, second)  # it goes on where it was


def test_a_clip_alone_is_the_one_in_the_batch(each):
    """With a generator each: equal to a few of the last bits."""
    prompts = ["a boat", "sea", "night"]
    together = film(each, 4, 5, 6, prompt=prompts, eta=0.5)
    for i, prompt in enumerate(prompts):
        assert (together[i] - film(each, 4 + i, prompt=prompt, eta=0.5)[0]).abs().max() < 1e-4
        assert (together[i] - film(each, 9, prompt=prompt, eta=0.5)[0]).abs().max() > 0.05  # negative control


def test_several_clips_of_each_prompt_come_prompt_by_prompt(pipe):
    many = film(pipe, 1, 2, 3, 4, prompt=["a boat", "sea"], num_videos_per_prompt=2, negative_prompt=["fog", "x"])
    wanted = [("a boat", "fog", 1), ("a boat", "fog", 2), ("sea", "x", 3), ("sea", "x", 4)]
    for i, (prompt, negative, seed) in enumerate(wanted):
        assert (many[i] - film(pipe, seed, prompt=prompt, negative_prompt=negative)[0]).abs().max() < 1e-4


def test_one_negative_prompt_serves_all(pipe):
    call = {"prompt": ["a boat", "sea"]}
    one = film(pipe, 1, 2, **call, negative_prompt="fog")
    # kernels may round a row otherwise beside others
    assert (one - film(pipe, 1, 2, **call, negative_prompt=["fog", "fog"])).abs().max() < 1e-4
    assert (one - film(pipe, 1, 2, **call, negative_prompt=["fog", ""])).abs().max() > 1e-3
    assert torch.equal(film(pipe, negative_prompt=""), film(pipe))


def test_guidance(pipe):
    plain = film(pipe, guidance_scale=1.0, negative_prompt="fog")
    assert torch.equal(plain, film(pipe, guidance_scale=0.0))
    assert torch.equal(plain, film(pipe, guidance_scale=1.0, use_dynamic_cfg=True))
    assert not torch.equal(plain, film(pipe, guidance_scale=3.0))
    assert not torch.equal(film(pipe, use_dynamic_cfg=True), film(pipe))
    assert torch.equal(film(pipe), film(pipe, guidance_scale=6))


def test_dynamic_guidance():
    """It is a function of the timestep, and 1 where the timestep is the number of steps."""
    assert dynamic_guidance(6.0, 50, 50) == 1
    assert dynamic_guidance(6.0, 0, 50) == 7
    assert 1 <= dynamic_guidance(6.0, 999, 50) <= 7


def test_latents_and_embeddings_given_are_those_made_inside(pipe):
    noise = torch.randn(1, 3, 4, 2, 4, generator=tiny.seeded(3))
    kept = noise.clone()
    assert torch.equal(film(pipe, 3), film(pipe, 8, latents=noise))
    assert torch.equal(noise, kept)
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a panda", "fog", max_sequence_length=tiny_video.MAX_TOKENS)
        alone, nothing = pipe.encode_prompt("a panda", None, False, max_sequence_length=tiny_video.MAX_TOKENS)
    assert torch.equal(alone, positive)
    assert nothing is None
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(film(pipe, negative_prompt="fog"), film(pipe, **embeds))
    assert torch.equal(
        film(pipe, 1, 2, num_videos_per_prompt=2),
        film(pipe, 1, 2, **embeds | {"negative_prompt_embeds": None}, num_videos_per_prompt=2),
    )


@pytest.mark.parametrize("prompt", ["", " ", "Öl ⛵", "静か", "a\nb\tc", "A BOAT", "<extra_id_0>"])
def test_any_text_is_a_prompt(pipe, prompt):
    clip = film(pipe, prompt=prompt)
    assert clip.isfinite().all()
    assert not torch.equal(clip, film(pipe))


def test_a_prompt_too_long_is_cut_with_a_warning(pipe, capsys):
    words = "a red panda in the red sea "
    with pytest.warns(UserWarning, match="The model reads 9 tokens; of this prompt it ignores '.*sea") as caught:
        cut = film(pipe, prompt=words * 3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert capsys.readouterr().err == ""
    with pytest.warns(UserWarning, match="ignores"):
        assert torch.equal(cut, film(pipe, prompt=words * 4))
    film(pipe, prompt=words * 3, max_sequence_length=40)


@pytest.mark.parametrize("kind", tiny_video.TRANSFORMERS)
def test_stages_in_their_order(tmp_path, kind):
    pipe, listener = tiny_video.pipeline(tmp_path, kind), Listener()
    with pipe.stages.observed(listener):
        film(pipe, num_inference_steps=4)
        film(pipe, num_inference_steps=1, output_type="latent")
    made = next(event[1] for event in listener.heard if event[0] == "decode")
    assert listener.heard[: 10 + made] == [
        ("encode prompt", None),
        ("encode prompt", "end"),
        ("denoise", 4),
        *(("denoise", "step", step) for step in range(1, 5)),
        ("denoise", "end"),
        ("decode", made),
        *(("decode", "step", frame) for frame in range(1, made + 1)),
        ("decode", "end"),
    ]
    assert [event[0] for event in listener.heard[10 + made :] if event[1] == "end"] == ["encode prompt", "denoise"]


def test_padding_in_front_is_denoised_and_dropped(tmp_path):
    pipe = tiny_video.pipeline(tmp_path, "1.5")
    assert [pipe.padding(frames) for frames in (1, 8, 9, 17)] == [1, 0, 1, 1]
    latents = film(pipe, output_type="latent")
    assert latents.shape == (1, 4, 4, 2, 4)
    with torch.no_grad():
        assert torch.equal(film(pipe), pipe.decode_latents(latents[:, 1:]))
    assert film(pipe, num_frames=8).shape[1] == 8


def test_a_callback_sees_every_step(pipe):
    seen = []

    def look(its_pipe, step, timestep, tensors):
        assert its_pipe is pipe
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))

    every = ("latents", "prompt_embeds", "negative_prompt_embeds")
    plain = film(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=every, num_inference_steps=3)
    assert torch.equal(plain, film(pipe, num_inference_steps=3))
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    shapes = {"latents": (1, 3, 4, 2, 4), "prompt_embeds": (2, 10, 16), "negative_prompt_embeds": (1, 10, 16)}
    assert all(got == shapes for _, _, got in seen)


def test_a_callback_changes_latents_and_embeddings(pipe):
    def changing(name, change):
        def callback(_pipe, _step, _timestep, tensors):
            assert tensors.keys() == {name}
            return {name: change(tensors[name])}

        return film(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[name], output_type=kind)

    kind = "latent"
    assert not changing("latents", torch.zeros_like).any()
    plain = film(pipe, output_type=kind)
    turned = changing("prompt_embeds", lambda embeds: embeds.flip(0))
    other = changing("negative_prompt_embeds", lambda embeds: embeds.flip(1))
    assert not torch.equal(turned, plain)
    assert not torch.equal(other, plain)
    assert torch.equal(changing("negative_prompt_embeds", lambda embeds: embeds), plain)
    assert torch.equal(changing("prompt_embeds", lambda embeds: embeds), plain)


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("clips", [1, 2])
def test_a_callback_ends_the_guidance(pipe, negatives, clips):
    """With the prompts' embeddings alone, the rest of the steps are without, whatever negative ones are returned."""

    def end(_pipe, _step, _timestep, tensors):
        more = {"negative_prompt_embeds": torch.ones(clips, 10, 16)} if negatives else {}
        return {"prompt_embeds": tensors["prompt_embeds"][-clips:], **more}

    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    call = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    film(pipe, *range(clips), num_inference_steps=3, num_videos_per_prompt=clips, **call)
    handle.remove()
    assert calls == [2 * clips, clips, clips]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_is_as_before(each, error):
    listener = Listener()
    expected = film(each, num_inference_steps=4)
    each.stages.observers.append(listener)

    def stop(_pipe, step, _timestep, _tensors):
        if step == 2:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        film(each, num_inference_steps=4, callback_on_step_end=stop)
    assert each.stages.observers == [listener]
    assert listener.heard[-2:] == [("denoise", "step", 2), ("denoise", "end")]
    assert torch.is_grad_enabled()
    assert torch.equal(film(each, num_inference_steps=4), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    pipe = tiny_video.pipeline(tmp_path)
    expected = film(pipe, guidance_scale=1.0)
    clip = film(pipe.to(dtype), guidance_scale=1.0)
    assert clip.dtype == dtype
    assert (clip - expected).abs().mean() < 0.05
    assert film(pipe, output_type="latent").dtype == dtype
    assert film(pipe, output_type="np").dtype == "float32"


def test_another_scheduler_may_be_put_in_at_any_time(tmp_path):
    pipe = tiny_video.pipeline(tmp_path)
    first = film(pipe, num_inference_steps=4)
    for name in SCHEDULERS:
        pipe.scheduler = tiny_video.SCHEDULERS[name].from_config(pipe.scheduler.config)
        assert film(pipe, num_inference_steps=4).isfinite().all(), name
    pipe.scheduler = tiny_video.SCHEDULERS[SCHEDULERS[0]].from_config(pipe.scheduler.config)
    assert torch.equal(film(pipe, num_inference_steps=4), first)


def test_no_clip_is_decoded_whole(pipe, monkeypatch):
    """Frames are taken from the decoder as they come, and one after the other."""
    given, whole = [], pipe.vae.decode_frames
    monkeypatch.setattr(pipe.vae, "decode", None)

    def decode_frames(z, write):
        assert z.shape[0] == 1
        whole(z, lambda first, frames: (given.append((first, frames.shape[2])), write(first, frames)))

    monkeypatch.setattr(pipe.vae, "decode_frames", decode_frames)
    film(pipe, prompt=["a", "b"], num_frames=17)
    assert given == [(0, 9), (9, 8)] * 2
