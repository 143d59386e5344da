"""What a script for the peer tells a call, a scheduler, or a running pipeline: the same picture as the peer's."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from tests import tiny
from tests.parity import test_cogvideox_pipeline as clips
from tests.parity import test_pipeline as pictures
from tests.parity.pairs import lent_quantiles
from tests.schedulers.trajectories import FLOW, seeded, start, toy_model, trajectory, with_memory, worst_difference

from lowtide.peer_names import INSTEAD
from lowtide.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
    pytest.mark.filterwarnings("ignore:.*Passing `callback:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The safety checker:UserWarning"),
    pytest.mark.filterwarnings("ignore:num_frames=:UserWarning"),
]

DPM, EULER, UNIPC = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Both pipelines; the peer's way to `clip_skip` is open again, which transformers 5 closed."""
    ours, theirs = pictures.pair(tmp_path_factory.mktemp("pictures"))
    theirs.text_encoder.__dict__["text_model"] = theirs.text_encoder
    return ours, theirs


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return clips.pair(tmp_path_factory.mktemp("clips"))


def use(pair, name):
    """Both pipelines with another scheduler."""
    ours, theirs = pair
    entries = tiny.scheduler("DDIMScheduler").config.to_dict()
    theirs.scheduler = getattr(diffusers, name).from_config(entries)
    ours.scheduler = SCHEDULERS[name].from_config(entries)


def same_but_not_plain(pair, **call):
    """Whether both draw one picture, and (the negative control) not the plain one."""
    ours, theirs = (pictures.picture(pipe, **call) for pipe in pair)
    assert pictures.worst(ours, theirs) <= pictures.TOLERANCE
    plain = pictures.picture(pair[0])
    assert plain.shape != ours.shape or pictures.worst(ours, plain) > pictures.TOLERANCE


CALLS = {
    "clip_skip": ("DDIMScheduler", {"clip_skip": 1}),
    "clip_skip of all layers": ("DDIMScheduler", {"clip_skip": 2}),
    "guidance_rescale": ("DDIMScheduler", {"guidance_rescale": 0.7}),
    "timesteps, Euler": (EULER, {"timesteps": [900, 500, 20]}),
    "timesteps, DPM": (DPM, {"timesteps": [900, 500, 20]}),
    "sigmas": (EULER, {"sigmas": [12.0, 3.0, 0.6, 0.0]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_picture(pair, name):
    scheduler, call = CALLS[name]
    use(pair, scheduler)
    same_but_not_plain(pair, **call)


def weaker(pipe, step, timestep, tensors):
    pipe._guidance_scale = 2.0
    return {}


def stop(pipe, step, timestep, tensors):
    pipe._interrupt = step == 1
    return {}


def cut_off(pipe, step, timestep, tensors):
    """As the peer's own callback does it."""
    if step == int(pipe.num_timesteps * 0.4):
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
    return tensors


STEPS = {
    "guidance changed": (weaker, ["latents"]),
    "interrupted": (stop, ["latents"]),
    "guidance cut off": (cut_off, ["prompt_embeds", "latents", "negative_prompt_embeds"]),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_callback_changes_the_run_as_in_the_peer(pair, name):
    use(pair, "DDIMScheduler")
    callback, inputs = STEPS[name]
    same_but_not_plain(pair, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)


@pytest.mark.parametrize("name", ["guidance changed", "interrupted"])
def test_a_callback_changes_the_clip_as_in_the_peer(films, name):
    ours, theirs = (clips.film(pipe, callback_on_step_end=STEPS[name][0]) for pipe in films)
    assert clips.worst(ours, theirs) <= clips.TOLERANCE
    assert clips.worst(ours, clips.film(films[0])) > clips.TOLERANCE  # negative control


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler"])
def test_the_older_callback_is_told_the_same(pair, name):
    use(pair, name)
    told = [[], []]
    for pipe, heard in zip(pair, told, strict=True):
        tell = lambda step, t, x, heard=heard: heard.append((step, int(t), x.clone()))  # noqa: E731
        pictures.picture(pipe, num_inference_steps=5, callback=tell, callback_steps=2)
    assert [seen[:2] for seen in told[0]] == [seen[:2] for seen in told[1]]
    assert len(told[0]) == (2 if name == "PNDMScheduler" else 3)  # its first nine calls make no step
    assert all(torch.allclose(a[2], b[2], atol=1e-4) for a, b in zip(*told, strict=True))


def test_what_runs_can_be_read(pair, films):
    for pipe in (pair[0], films[0]):
        seen = []

        def look(pipe, step, timestep, tensors, seen=seen):
            seen.append((pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt, pipe.do_classifier_free_guidance))
            assert pipe.current_timestep is timestep
            assert pipe.clip_skip is pipe.cross_attention_kwargs is pipe.attention_kwargs is None

        size = {"height": 16, "width": 16} if pipe is pair[0] else {"height": 16, "width": 16, "num_frames": 1}
        common = {"output_type": "latent", "generator": tiny.seeded(1), "callback_on_step_end": look}
        if pipe is films[0]:
            common["max_sequence_length"] = 10
        pipe("a boat", num_inference_steps=2, guidance_scale=3.5, **size, **common)
        assert seen == [(3.5, 2, False, True)] * 2
        assert pipe.current_timestep is None


def test_guidance_cannot_begin_in_the_middle(pair):
    """The peer stops there, too, with an error about shapes."""
    with pytest.raises(ValueError, match=r"no embeddings of negative prompts.*begin the call with guidance"):
        pictures.picture(pair[0], guidance_scale=1.0, callback_on_step_end=weaker)


def flags_bright(images, **kwargs):
    flags = [bool(image.mean() > -2) for image in images]
    return images.clamp(0, 1) * 0.5, flags


CHECKERS = {
    "none": None,
    "all is well": lambda images, **kwargs: (images, [False] * len(images)),
    "mirrors": lambda images, **kwargs: (images.flip(-1), [False] * len(images)),
    "flags": flags_bright,
}


@pytest.mark.parametrize("name", CHECKERS)
def test_any_function_can_check(pair, tmp_path, name):
    use(pair, "DDIMScheduler")
    ours, theirs = pair
    theirs.feature_extractor = tiny.image_processor(tmp_path)
    results = []
    try:
        for pipe in pair:
            pipe.safety_checker = CHECKERS[name]
            call = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
            results.append(pipe(pictures.PROMPTS[0], **call, generator=tiny.seeded(3)))
    finally:
        ours.safety_checker = theirs.safety_checker = None
    assert pictures.worst(results[0].images, results[1].images) <= pictures.TOLERANCE
    assert results[0].nsfw_content_detected == results[1].nsfw_content_detected
    plain = pictures.picture(ours, num_inference_steps=2)
    assert (pictures.worst(results[0].images, plain) > pictures.TOLERANCE) == (name in ("mirrors", "flags"))


def test_a_checker_that_returns_nothing_is_told(pair):
    pair[0].safety_checker = lambda images, **kwargs: None
    try:
        with pytest.raises(TypeError, match="safety_checker must return the images and a list"):
            pictures.picture(pair[0])
    finally:
        pair[0].safety_checker = None


# ---- tiles


def test_tiles_are_set_by_attributes(pair):
    """Before tiling is on, and while it is."""
    use(pair, "DDIMScheduler")
    size = {"height": 32, "width": 32}
    whole = pictures.picture(pair[0], **size)
    try:
        for pipe in pair:
            pipe.vae.tile_overlap_factor = 0.5
            pipe.vae.use_tiling = True
            pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 16 // pipe.vae_scale_factor
        ours, theirs = (pictures.picture(pipe, **size) for pipe in pair)
        assert pictures.worst(ours, theirs) <= pictures.TOLERANCE
        assert pictures.worst(ours, whole) > pictures.TOLERANCE  # negative control
        pair[0].vae.use_tiling = False
        assert pictures.worst(pictures.picture(pair[0], **size), whole) == 0
        pair[0].vae.enable_tiling(True)
        assert pictures.worst(pictures.picture(pair[0], **size), theirs) <= pictures.TOLERANCE
    finally:
        for pipe in pair:
            pipe.vae.use_tiling = False


def test_tiles_of_clips_are_set_by_attributes(films):
    z = tiny.numbers((1, 4, 2, 4, 6), 3)
    sizes = {"tile_sample_min_height": 16, "tile_sample_min_width": 32}
    sizes |= {"tile_overlap_factor_height": 0.5, "tile_overlap_factor_width": 0.5}
    with torch.no_grad():
        whole = films[0].vae.decode(z).sample
        try:
            for pipe in films:
                pipe.vae.enable_tiling(**sizes)
            ours, theirs = (pipe.vae.decode(z).sample for pipe in films)
            assert films[0].vae.tile_latent_min_width == films[1].vae.tile_latent_min_width == 4
        finally:
            for pipe in films:
                pipe.vae.disable_tiling()
    assert tiny.difference(ours, theirs) <= 1e-5
    assert tiny.difference(ours, whole) > 1e-3  # negative control


# ---- schedulers

OTHER = {
    "num_train_timesteps": 800,
    "beta_start": 0.001,
    "beta_end": 0.015,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": [0.0001 + 0.00002 * i for i in range(1000)],
    "clip_sample": False,
    "set_alpha_to_one": None,
    "steps_offset": {"steps_offset": 3, "timestep_spacing": "leading"},
    "prediction_type": "v_prediction",
    "clip_sample_range": 0.6,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "skip_prk_steps": True,
    "solver_order": 3,
    "predict_x0": {"predict_x0": False, "final_sigmas_type": "sigma_min"},
    "solver_type": None,
    "lower_order_final": {"lower_order_final": False, "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "disable_corrector": [0, 1],
    "use_karras_sigmas": True,
    "use_exponential_sigmas": True,
    "final_sigmas_type": {"final_sigmas_type": "sigma_min", "beta_start": 0.01},
    "sigma_min": {"sigma_min": 0.2, "use_karras_sigmas": True},
    "sigma_max": {"sigma_max": 9.0, "use_karras_sigmas": True},
    "euler_at_final": {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "lambda_min_clipped": {"lambda_min_clipped": -4.0},
    "snr_shift_scale": 1.5,
    "thresholding": {"thresholding": True, "sample_max_value": 3.0},
    "dynamic_thresholding_ratio": {"dynamic_thresholding_ratio": 0.6, "thresholding": True, "sample_max_value": 3.0},
    "sample_max_value": {"sample_max_value": 2.0, "thresholding": True},
    "algorithm_type": "sde-dpmsolver++",
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "use_flow_sigmas": True,
    "flow_shift": {"flow_shift": 3.0, **FLOW},
    "use_dynamic_shifting": {"use_dynamic_shifting": True, **FLOW},
    "time_shift_type": {"time_shift_type": "linear", "use_dynamic_shifting": True, **FLOW},
    "shift_terminal": {"shift_terminal": 0.1, **FLOW},
    "variance_type": "learned",
    "interpolation_type": "log_linear",
    "timestep_type": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
}
"""A value beside the usual one for each entry; None: the other of two."""
IDLE = {(DPM, "variance_type"), (DPM, "time_shift_type")}
"""They change nothing in the peer either: variances are left out, and there only an exponential shift takes `mu`."""
REFUSED_ENTRIES = {"solver_p": "DDIM"}


def entries_of(name):
    return [entry for entry in inspect.signature(getattr(diffusers, name).__init__).parameters if entry != "self"]


def other(name, entry):
    value = OTHER[entry]
    if entry == "set_alpha_to_one":
        value = name == "PNDMScheduler"
    if entry == "solver_type":
        value = {"solver_type": "bh1" if name == UNIPC else "heun", "final_sigmas_type": "sigma_min"}
    if (name, entry) == (DPM, "time_shift_type"):
        value = "linear"
    return value if isinstance(value, dict) else {entry: value}


def with_variances(sample, t):
    """What a model predicts that has learned variances, too."""
    return torch.cat([toy_model(sample, t), sample], dim=1)


def walks(name, entries, num_steps=7, told=None):
    pair = SCHEDULERS[name](**entries), with_memory(getattr(diffusers, name)(**entries))
    told = {"mu": 0.7} if entries.get("use_dynamic_shifting") else told
    model = with_variances if "variance_type" in entries else toy_model
    options = {"model": model, "told": told}
    return [trajectory(one, num_steps, start(2), **options, **seeded(name, entries)) for one in pair]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_entry_of_a_scheduler_by_name(name, monkeypatch):
    """Given to the constructor: the same steps as the peer's, and not the usual ones; or refused by name."""
    lent_quantiles(monkeypatch)
    idle = {entry for scheduler, entry in IDLE if scheduler == name}
    if name.startswith("CogVideoX"):
        idle |= {"clip_sample", "clip_sample_range", "sample_max_value"}
    for entry in entries_of(name):
        if entry in REFUSED_ENTRIES:
            with pytest.raises(ValueError, match=entry):
                SCHEDULERS[name](**{entry: REFUSED_ENTRIES[entry]})
            continue
        asked = {key: value for key, value in other(name, entry).items() if key in entries_of(name)}
        ours, theirs = walks(name, asked)
        usual = walks(name, {key: value for key, value in asked.items() if key != entry})[0]
        assert worst_difference(ours, theirs) <= 1e-5, entry
        changes = len(ours) != len(usual) or not torch.allclose(ours[-1], usual[-1], rtol=1e-3)
        assert changes == (entry not in idle), entry


def test_few_entries_are_refused():
    assert len(REFUSED_ENTRIES) == 1
    assert not set(REFUSED_ENTRIES) & set(OTHER)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_entries_beside_a_configuration(name):
    """As scripts change a pipeline's scheduler."""
    first = tiny.scheduler("DDIMScheduler")
    ours = SCHEDULERS[name].from_config(dict(first.config), steps_offset=0, timestep_spacing="trailing")
    theirs = getattr(diffusers, name).from_config(dict(first.config), steps_offset=0, timestep_spacing="trailing")
    assert SCHEDULERS[name].from_config(first.config, steps_offset=0).config.steps_offset == 0
    assert ours.config.steps_offset == theirs.config.steps_offset == 0
    assert worst_difference(*(trajectory(s, 5, start(1), **seeded(name)) for s in (ours, with_memory(theirs)))) <= 1e-5
    with pytest.raises(TypeError, match=r"takes no argument 'beta_strat'"):
        SCHEDULERS[name].from_config(first.config, beta_strat=1)
    with pytest.raises(TypeError, match="takes its entries by name"):
        SCHEDULERS[name](1000)


OPTIONS = {
    "DDIMScheduler": [
        {"eta": 0.7, "variance_noise": start(9)},
        {"use_clipped_model_output": True},
        {"eta": 0.5, "generator": 4},
    ],
    EULER: [
        {"s_churn": 2.0, "generator": 5},
        {"s_churn": 2.0, "s_noise": 1.1, "s_tmin": 0.3, "s_tmax": 9.0, "generator": 5},
    ],
}
NO_EFFECT = {DPM: [{"variance_noise": start(9)}, {"generator": 3}]}


def stepped(scheduler, options):
    scheduler.set_timesteps(5)
    sample = start(3) * scheduler.init_noise_sigma
    own = {**options, "generator": tiny.seeded(options["generator"])} if "generator" in options else options
    for t in scheduler.timesteps:
        output = toy_model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, **own, return_dict=False)[0]
    return [sample]


@pytest.mark.parametrize("name", [*OPTIONS, *NO_EFFECT])
def test_every_option_of_a_step(name):
    for options in OPTIONS.get(name) or NO_EFFECT[name]:
        ours, theirs = stepped(SCHEDULERS[name](), options), stepped(getattr(diffusers, name)(), options)
        assert worst_difference(ours, theirs) <= 1e-5, options
        assert (worst_difference(ours, stepped(SCHEDULERS[name](), {})) > 1e-4) == (name in OPTIONS)


def test_every_argument_of_steps_is_taken():
    """By inspection: what the peer's `step` and `set_timesteps` take, ours take."""
    for name, cls in SCHEDULERS.items():
        for method in ("set_timesteps", "step"):
            theirs = inspect.signature(getattr(getattr(diffusers, name), method)).parameters
            ours = inspect.signature(getattr(cls, method)).parameters
            assert set(theirs) <= set(ours), name
    dpm = SCHEDULERS["CogVideoXDPMScheduler"]()
    dpm.set_timesteps(3)
    with pytest.raises(TypeError, match="remembers the last prediction"):
        dpm.step(start(), None, dpm.timesteps[0], None, start())


TERMINAL = {**FLOW, "shift_terminal": 0.1}
TOLD = [
    (EULER, {}, {"timesteps": [900, 500, 20]}),
    (EULER, {"interpolation_type": "log_linear"}, {"timesteps": [900, 500, 20]}),
    (EULER, {}, {"sigmas": [12.0, 3.0, 0.6, 0.0]}),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {"sigmas": [12.0, 3.0, 0.6, 0.0]}),
    (DPM, {}, {"timesteps": [900, 500, 20]}),
    (UNIPC, FLOW, {"sigmas": np.array([0.9, 0.5, 0.2])}),
    (UNIPC, {**FLOW, "flow_shift": 3.0}, {"sigmas": np.array([1.0, 0.5, 0.2])}),
    (UNIPC, TERMINAL, {"sigmas": np.array([0.9, 0.5, 0.2])}),
    (UNIPC, {**FLOW, "use_dynamic_shifting": True}, {"sigmas": np.array([0.9, 0.5, 0.2]), "mu": 0.7}),
]


@pytest.mark.parametrize(("name", "entries", "told"), TOLD)
def test_timesteps_and_sigmas_that_are_told(name, entries, told):
    pair = SCHEDULERS[name](**entries), getattr(diffusers, name)(**entries)
    ours, theirs = (trajectory(scheduler, None, start(2), told=told) for scheduler in pair)
    assert worst_difference(ours, theirs) <= 1e-5
    assert worst_difference(ours[:1], theirs[1:2]) > 1e-3  # negative control


@pytest.mark.parametrize("mu", [-1.0, 0.3, 1.15])
@pytest.mark.parametrize("name", [DPM, UNIPC])
def test_mu_shifts_a_flow(name, mu):
    """Of one run, unlike in the peer's DPM-Solver, where it is the shift of the runs after it, too."""
    entries = {**FLOW, "use_dynamic_shifting": True}
    ours = SCHEDULERS[name](**entries)
    trajectories = [
        trajectory(one, 9, start(2), told={"mu": mu}) for one in (ours, getattr(diffusers, name)(**entries))
    ]
    assert worst_difference(*trajectories) <= 1e-5
    shifted = walks(name, {**FLOW, "flow_shift": math.exp(mu)}, 9)
    assert worst_difference(trajectories[0], shifted[0]) <= 1e-5
    assert worst_difference(trajectories[0], walks(name, FLOW, 9)[0]) > 1e-3  # negative control
    if name == DPM:
        assert worst_difference(trajectory(ours, 9, start(2)), walks(name, FLOW, 9)[0]) <= 1e-5


@pytest.mark.parametrize("name", [EULER, DPM, "UniPCMultistepScheduler"])
def test_a_run_begins_where_it_is_told(name):
    pair = SCHEDULERS[name](), getattr(diffusers, name)()
    ends = []
    for scheduler in pair:
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        assert (scheduler.begin_index, scheduler.step_index) == (2, None)
        sample = start(3)
        for t in scheduler.timesteps[2:]:
            sample = scheduler.step(toy_model(scheduler.scale_model_input(sample, t), t), t, sample).prev_sample
        assert scheduler.step_index == 6
        scheduler._step_index = 0  # anywhere
        ends.append([sample])
    assert worst_difference(*ends) <= 1e-5
    assert pair[0].step_index == 0


def test_other_noise_levels_can_be_assigned():
    for name in (EULER, DPM, "DDIMScheduler"):
        pair = SCHEDULERS[name](), getattr(diffusers, name)()
        usual = trajectory(SCHEDULERS[name](), 5, start(1))
        for scheduler in pair:
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.3
        ours, theirs = (trajectory(scheduler, 5, start(1)) for scheduler in pair)
        assert worst_difference(ours, theirs) <= 1e-5, name
        assert worst_difference(ours, usual) > 1e-3, name  # negative control


# ---- every argument of a call


def assert_same_clip_of_latents(films):
    noise = tiny.numbers((1, 3, 4, 2, 4), 4)
    ours, theirs = (clips.film(pipe, latents=noise, generator=None) for pipe in films)
    assert clips.worst(ours, theirs) <= clips.TOLERANCE
    assert clips.worst(ours, clips.film(films[0])) > clips.TOLERANCE  # negative control


REFUSED_IN_CALLS = {
    "StableDiffusionPipeline": {
        "ip_adapter_image": 1,
        "ip_adapter_image_embeds": 1,
        "cross_attention_kwargs": {"scale": 1},
    },
    "CogVideoXPipeline": {"attention_kwargs": {"scale": 1.0}},
}


@pytest.mark.parametrize("name", REFUSED_IN_CALLS)
def test_every_argument_of_a_call_is_compared_or_refused(pair, films, name):
    ours = (pair if name.startswith("Stable") else films)[0]
    theirs = set(inspect.signature(getattr(diffusers, name).__call__).parameters) - {"self", "kwargs"}
    compared = {"prompt", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict"}
    compared |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    cases = (
        [*pictures.CALLS.values(), *(call for _, call in CALLS.values())] if ours is pair[0] else clips.CALLS.values()
    )
    compared |= {argument for case in cases for argument in case}
    if ours is films[0]:
        # The peer makes one clip of each prompt, whatever it is told; and its schedulers take no timesteps either.
        compared |= {"max_sequence_length", "latents", "num_videos_per_prompt", "timesteps"}
        assert_same_clip_of_latents(films)
        for pipe in films:
            with pytest.raises(ValueError, match=r"timesteps|custom"):
                clips.film(pipe, timesteps=[900, 500])
    refused = REFUSED_IN_CALLS[name]
    assert theirs - compared - set(refused) == set()
    for argument, value in refused.items():
        with pytest.raises((TypeError, ValueError), match=f"{argument}.*adapters"):
            ours("a boat", **{argument: value})
        assert argument in INSTEAD or "attention_kwargs" in argument
    with pytest.raises(TypeError, match="takes no argument 'promt'"):
        ours(promt="a boat")
