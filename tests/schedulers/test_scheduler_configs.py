"""Configurations: defaults, round trips through every other class, refusals that say what is possible."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schedulers.trajectories import AT_SIGMA_MIN, COGVIDEOX_5B, FLOW, SD15

from lowtide.schedulers import (
    SCHEDULERS,
    CogVideoXDDIMConfig,
    DDIMConfig,
    DPMSolverMultistepConfig,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMConfig,
    PNDMScheduler,
    UniPCMultistepConfig,
    UniPCMultistepScheduler,
)

PAIRS = list(itertools.permutations(SCHEDULERS, 2))
COGVIDEOX = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}
OTHERS = [name for name in SCHEDULERS if name not in COGVIDEOX]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_a_published_file_survives_another_class(name, other):
    first = SCHEDULERS[name].from_config(SD15)
    again = SCHEDULERS[name].from_config(SCHEDULERS[other].from_config(first.config).config)
    assert again.config == first.config
    assert again.config.to_dict() == first.config.to_dict()


@pytest.mark.parametrize("source", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler"])
def test_a_published_video_model_file_survives_another_class(name, source):
    first = SCHEDULERS[source].from_config(COGVIDEOX_5B).config
    other = SCHEDULERS[name].from_config(first).config
    published = {key: value for key, value in COGVIDEOX_5B.items() if not key.startswith("_")}
    assert {key: other[key] for key in published} == published
    assert SCHEDULERS[source].from_config(other).config == first


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "num_train_timesteps": st.integers(1, 2000),
        "beta_start": st.floats(1e-5, 0.01),
        "beta_end": st.floats(0.011, 0.5),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "clip_sample": st.booleans(),
        "skip_prk_steps": st.booleans(),
        "set_alpha_to_one": st.booleans(),
        "lower_order_final": st.booleans(),
        "use_karras_sigmas": st.booleans(),
        "solver_order": st.integers(1, 3),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "solver_type": st.sampled_from(["midpoint", "heun", "bh1", "bh2"]),
        "lambda_min_clipped": st.sampled_from([-math.inf, -5.1]),
        "snr_shift_scale": st.sampled_from([1.0, 3.0]),
        "thresholding": st.just(False),
        "dynamic_thresholding_ratio": st.floats(0.5, 1),
        "flow_shift": st.floats(1, 12),
        "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++", "deis"]),
        "interpolation_type": st.sampled_from(["linear", "log_linear"]),
        "timestep_type": st.sampled_from(["discrete", "continuous"]),
        "a_key_of_tomorrow": st.integers(),
    },
)


@given(entries=ENTRIES, names=st.lists(st.sampled_from(list(SCHEDULERS)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_entries_survive_any_chain_of_classes(entries, names):
    """A shift of the noise that no entry tells is the one of the first class, all along."""
    told = {"snr_shift_scale": 3.0 if names[0] in COGVIDEOX else 1.0} if {names[0], names[-1]} & COGVIDEOX else {}
    direct = SCHEDULERS[names[-1]].from_config({**told, **entries})
    scheduler = SCHEDULERS[names[0]].from_config(entries)
    for name in names[1:]:
        scheduler = SCHEDULERS[name].from_config(scheduler.config)
    assert scheduler.config == direct.config
    assert scheduler.config.to_dict() == direct.config.to_dict()


def same_noise(one, other):
    """Whether two schedulers have the same training schedule, but for solvers that cannot stand ᾱ = 0 at its end."""
    pairs = [scheduler.alphas_cumprod.double().clamp(min=2.0**-24) for scheduler in (one, other)]
    return torch.allclose(*pairs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("video", sorted(COGVIDEOX))
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("told", [{}, {"snr_shift_scale": 3.0}, {"snr_shift_scale": 1.0}, {"snr_shift_scale": 7.5}])
def test_the_noise_is_the_same_in_another_class(name, video, zero_snr, told, tmp_path):
    """There and back; from files, too, where they tell the shift."""
    if zero_snr and name == "PNDMScheduler":
        pytest.skip("PNDM refuses rescale_betas_zero_snr")
    entries = {**NOISE, "rescale_betas_zero_snr": zero_snr, **told}
    first, there = SCHEDULERS[video].from_config(entries), SCHEDULERS[name].from_config(entries)
    assert first.config.snr_shift == told.get("snr_shift_scale", 3.0)
    assert there.config.snr_shift == told.get("snr_shift_scale", 1.0)
    for source, other in ((first, SCHEDULERS[name]), (there, SCHEDULERS[video])):
        moved = other.from_config(source.config)
        back = type(source).from_config(moved.config)
        assert same_noise(moved, source)
        assert torch.equal(back.alphas_cumprod, source.alphas_cumprod)
        assert back.config.to_dict() == source.config.to_dict()
        source.save_pretrained(tmp_path)
        if "snr_shift_scale" in source.config:
            assert same_noise(other.from_pretrained(tmp_path), source)
    assert same_noise(first, there) == bool(told), "negative control: a shift alone makes a difference"


def test_shifted_noise_is_that_of_cogvideox_to_the_last_bit():
    """Shifted first, then stretched to end in pure noise."""
    entries = {**COGVIDEOX_5B, "snr_shift_scale": 3.0}
    video, ddim = (SCHEDULERS[name].from_config(entries) for name in ("CogVideoXDDIMScheduler", "DDIMScheduler"))
    assert torch.equal(video.alphas_cumprod.float(), ddim.alphas_cumprod)
    assert ddim.alphas_cumprod[-1] == 0


def test_no_shift_is_written_where_there_is_none(tmp_path):
    for source in (DDIMConfig(), CogVideoXDDIMConfig(snr_shift_scale=1.0)):
        video = SCHEDULERS["CogVideoXDPMScheduler"].from_config(source)
        assert video.config.snr_shift_scale == 1
        EulerDiscreteScheduler.from_config(video.config).save_pretrained(tmp_path)
        assert "snr_shift_scale" not in json.loads((tmp_path / "scheduler_config.json").read_text())
    EulerDiscreteScheduler.from_config(CogVideoXDDIMConfig()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["snr_shift_scale"] == 3


def test_entries_not_given_take_the_next_class_default():
    """As in the peer: PNDM's "leading" goes over to UniPC only if the file spells it out."""
    silent = PNDMScheduler.from_config(SD15).config
    spoken = PNDMScheduler.from_config({**SD15, "timestep_spacing": "leading"}).config
    assert silent.timestep_spacing == spoken.timestep_spacing == "leading"
    assert UniPCMultistepScheduler.from_config(silent).config.timestep_spacing == "linspace"
    assert UniPCMultistepScheduler.from_config(spoken).config.timestep_spacing == "leading"


def test_changed_entries_of_a_config_built_in_code_go_over():
    config = dataclasses.replace(PNDMScheduler.from_config(SD15).config, timestep_spacing="trailing")
    assert EulerDiscreteScheduler.from_config(config).config.timestep_spacing == "trailing"
    assert EulerDiscreteScheduler.from_config(DDIMConfig(beta_start=0.001)).config.beta_start == 0.001


def test_the_peers_record_of_defaults_is_honoured():
    entries = {**SD15, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert UniPCMultistepScheduler.from_config(entries).config.timestep_spacing == "linspace"


def test_values_of_another_class_give_way_and_come_back():
    unipc = UniPCMultistepScheduler(UniPCMultistepConfig(solver_type="bh1"))
    dpm = DPMSolverMultistepScheduler.from_config(unipc.config)
    assert dpm.config.solver_type == "midpoint"
    assert UniPCMultistepScheduler.from_config(dpm.config).config.solver_type == "bh1"
    heun = dataclasses.replace(dpm.config, solver_type="heun")
    assert UniPCMultistepScheduler.from_config(heun).config.solver_type == "bh2"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_file_round_trip(name, tmp_path):
    scheduler = SCHEDULERS[name].from_config({**SD15, "a_key_of_tomorrow": [1, 2]})
    scheduler.save_pretrained(tmp_path / "scheduler")
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == name
    assert "_diffusers_version" in written
    assert not {"given", "unused"} & written.keys()
    read = SCHEDULERS[name].from_pretrained(tmp_path, subfolder="scheduler")
    assert read.config == scheduler.config
    assert read.config.to_dict() == scheduler.config.to_dict()


def test_clipping_at_minus_infinity_can_be_written(tmp_path):
    DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    assert DPMSolverMultistepScheduler.from_pretrained(tmp_path).config.lambda_min_clipped == -math.inf


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json does not exist"):
        PNDMScheduler.from_pretrained(tmp_path)


KARRAS = {"use_karras_sigmas": True}
KARRAS_AND_BETA = {**KARRAS, "use_beta_sigmas": True}
OF_NOISE = {"algorithm_type": "dpmsolver", **AT_SIGMA_MIN}
NOISE_SDE_3 = {"algorithm_type": "sde-dpmsolver", "solver_order": 3, **AT_SIGMA_MIN}


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "DDIM: beta_schedule='sigmoid' .* 'squaredcos_cap_v2'"),
        ("DDIMScheduler", {"thresholding": "yes"}, "thresholding='yes' is not possible; it must be true or false"),
        ("DDIMScheduler", {"dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio=2 .* a number from 0 to 1"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ("CogVideoXDDIMScheduler", {"thresholding": True}, "thresholding=True is not supported"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "PNDM: prediction_type='sample' .* 'epsilon', 'v_prediction'"),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "even"}, "timestep_spacing='even' .* 'trailing'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type='cubic' .* 'log_linear'"),
        ("EulerDiscreteScheduler", {"timestep_type": "even"}, "timestep_type='even' .* 'continuous'"),
        ("EulerDiscreteScheduler", KARRAS_AND_BETA, "use_karras_sigmas and use_beta_sigmas are not possible together"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde"},
            r"must be one of 'dpmsolver\+\+', 'dpmsolver', 'sde-",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, r"'dpmsolver' cannot end .*='dpmsolver\+\+'"),
        ("DPMSolverMultistepScheduler", NOISE_SDE_3, "solver_order=3 .* 1 or 2 where algorithm_type='sde-dpmsolver'"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_lu_lambdas": True}, "use_lu_lambdas and use_flow_sigmas are not"),
        ("DPMSolverMultistepScheduler", {**FLOW, **OF_NOISE}, "A flow begins in pure noise"),
        ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 0}, "flow_shift=0 .* from 0.001 to 1000"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4 .* one of 1, 2, 3"),
        ("DPMSolverMultistepScheduler", {"variance_type": "fixed"}, "variance_type='fixed' .* 'learned_range'"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "where use_flow_sigmas=False"),
        ("UniPCMultistepScheduler", {**FLOW, "prediction_type": "v_prediction"}, "where use_flow_sigmas=True"),
        ("UniPCMultistepScheduler", {**FLOW, "use_beta_sigmas": True}, "use_flow_sigmas and use_beta_sigmas"),
        ("UniPCMultistepScheduler", {"use_dynamic_shifting": True}, "possible only with use_flow_sigmas=True"),
        (
            "UniPCMultistepScheduler",
            {"shift_terminal": 0.1},
            "shift_terminal=0.1 is possible only with use_flow_sigmas",
        ),
        ("UniPCMultistepScheduler", {**FLOW, "shift_terminal": 1.0}, "shift_terminal=1.0"),
        ("UniPCMultistepScheduler", {**FLOW, **KARRAS, "shift_terminal": 0.1}, "use_karras_sigmas and shift_terminal"),
        ("UniPCMultistepScheduler", {**FLOW, "predict_x0": False, **AT_SIGMA_MIN}, "A flow begins in pure noise"),
        (
            "UniPCMultistepScheduler",
            {"thresholding": True, "predict_x0": False, **AT_SIGMA_MIN},
            "only with predict_x0=True",
        ),
        ("UniPCMultistepScheduler", {"solver_p": "DDIM"}, "solver_p='DDIM' is not supported"),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}, "solver_type='bh3' .* 'bh1', 'bh2'"),
        ("DDIMScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps='1000' .* a whole number from 1"),
        ("DDIMScheduler", {"num_train_timesteps": 10**12}, "a whole number from 1 to"),
        ("DDIMScheduler", {"steps_offset": -1}, "steps_offset=-1 .* from 0 to 999"),
        ("DDIMScheduler", {"beta_end": 1.5}, r"beta_end=1\.5"),
        ("DDIMScheduler", {"beta_start": math.nan}, "beta_start=nan"),
        ("CogVideoXDDIMScheduler", {"snr_shift_scale": 0}, "CogVideoXDDIM: snr_shift_scale=0 .* a number from 1e-06"),
        ("DDIMScheduler", {"snr_shift_scale": "3"}, "DDIM: snr_shift_scale='3' .* a number from 1e-06"),
        ("CogVideoXDPMScheduler", {"prediction_type": "flow"}, "CogVideoXDPM: prediction_type='flow' .* 'epsilon'"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas=.* 1000 numbers"),
    ],
)
def test_values_not_supported_are_refused(name, entries, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULERS[name].from_config(entries)


@pytest.mark.parametrize(
    "config", [DDIMConfig(), PNDMConfig(), DPMSolverMultistepConfig()], ids=lambda c: type(c).__name__
)
def test_configs_are_frozen_and_read_like_mappings(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta_start = 0.1
    assert config["beta_start"] == config.get("beta_start") == 0.0001
    assert "num_train_timesteps" in config
    assert "given" not in config
