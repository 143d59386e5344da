"""Configurations: defaults, round trips through every other class, refusals that say what is possible."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schedulers.trajectories import COGVIDEOX_5B, SD15

from lowtide.schedulers import (
    SCHEDULERS,
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
        "a_key_of_tomorrow": st.integers(),
    },
)


@given(entries=ENTRIES, names=st.lists(st.sampled_from(list(SCHEDULERS)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_entries_survive_any_chain_of_classes(entries, names):
    direct = SCHEDULERS[names[-1]].from_config(entries)
    scheduler = SCHEDULERS[names[0]].from_config(entries)
    for name in names[1:]:
        scheduler = SCHEDULERS[name].from_config(scheduler.config)
    assert scheduler.config == direct.config
    assert scheduler.config.to_dict() == direct.config.to_dict()


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


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, "DDIM: beta_schedule='sigmoid' .* 'squaredcos_cap_v2'"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding=True is not supported; it must be one of False, None"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "PNDM: prediction_type='sample' .* 'epsilon', 'v_prediction'"),
        ("PNDMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "even"}, "timestep_spacing='even' .* 'trailing'"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, r"must be one of 'dpmsolver\+\+'"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4 .* one of 1, 2, 3"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("UniPCMultistepScheduler", {"solver_type": "bh3"}, "solver_type='bh3' .* 'bh1', 'bh2'"),
        ("DDIMScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps='1000' .* a whole number from 1"),
        ("DDIMScheduler", {"num_train_timesteps": 10**12}, "a whole number from 1 to"),
        ("DDIMScheduler", {"steps_offset": -1}, "steps_offset=-1 .* from 0 to 999"),
        ("DDIMScheduler", {"beta_end": 1.5}, r"beta_end=1\.5"),
        ("DDIMScheduler", {"beta_start": math.nan}, "beta_start=nan"),
        ("CogVideoXDDIMScheduler", {"snr_shift_scale": 0}, "CogVideoXDDIM: snr_shift_scale=0 .* a number from 1e-06"),
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
