"""Whole trajectories of our schedulers against the peer's: same calls, same samples."""

import itertools
import json

import pytest
import torch
from tests.schedulers.trajectories import SD15, start, toy_model, trajectory, worst_difference

from lowtide.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
]

TOLERANCE = 1e-6
DDIM, PNDM, UNIPC, EULER, DPM = SCHEDULERS
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = [
    (name, {"timestep_spacing": s, "prediction_type": p, "beta_schedule": b, "steps_offset": 1})
    for name, s, p, b in itertools.product(SCHEDULERS, SPACINGS, PREDICTIONS, BETAS)
    if (name, p) != (PNDM, "sample")
]
DPM_OPTIONS = [
    {"solver_order": o, "solver_type": s, "lower_order_final": low, "euler_at_final": euler, "final_sigmas_type": last}
    for o, s, low, euler, last in itertools.product(
        (1, 2, 3), ("midpoint", "heun"), (True, False), (True, False), ("zero", "sigma_min")
    )
]
UNIPC_OPTIONS = [
    {"solver_order": o, "solver_type": s, "predict_x0": x0, "lower_order_final": low, "disable_corrector": off}
    for o, s, x0, low, off in itertools.product((1, 2, 3), ("bh1", "bh2"), (True, False), (True, False), ([], [0, 2]))
]
SPECIAL = [
    *((DPM, options) for options in DPM_OPTIONS),
    *((UNIPC, {**options, "final_sigmas_type": "sigma_min"}) for options in UNIPC_OPTIONS),
    *((UNIPC, {"solver_order": order}) for order in (1, 3)),
    *((name, {"use_karras_sigmas": True, "timestep_spacing": s}) for name in (EULER, DPM, UNIPC) for s in SPACINGS),
    *((name, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}) for name in (EULER, DPM, UNIPC)),
    *((name, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}) for name in (EULER, DPM, UNIPC)),
    *((name, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}) for name in (EULER, UNIPC)),
    (EULER, {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}),
    (EULER, {"final_sigmas_type": "sigma_min"}),
    *(
        (name, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"})
        for name in (DDIM, EULER, DPM, UNIPC)
    ),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}),
    (DDIM, {"clip_sample": True, "clip_sample_range": 0.7, "set_alpha_to_one": False}),
    (PNDM, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    (PNDM, {"num_train_timesteps": 300, "trained_betas": [0.0001 + 0.00004 * i for i in range(300)]}),
]


def pair(name, entries):
    """Our scheduler and the peer's, from the same entries."""
    entries = {**BASE, **entries}
    if name == PNDM:
        entries = {"skip_prk_steps": True, **entries}
    return SCHEDULERS[name].from_config(entries), getattr(diffusers, name)(**entries)


def difference(name, entries, num_steps, dtype=torch.float32):
    ours, theirs = pair(name, entries)
    noise = start(num_steps, dtype)
    return worst_difference(trajectory(ours, num_steps, noise), trajectory(theirs, num_steps, noise))


def label(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


@pytest.mark.parametrize(("name", "entries"), PLAIN, ids=label)
def test_trajectory(name, entries):
    for num_steps in (1, 2, 3, 7, 20, 50):
        assert difference(name, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize(("name", "entries"), SPECIAL, ids=label)
def test_trajectory_with_options(name, entries):
    for num_steps in (2, 7, 20):
        assert difference(name, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_runge_kutta_trajectory(spacing, prediction):
    entries = {"skip_prk_steps": False, "timestep_spacing": spacing, "prediction_type": prediction}
    for num_steps in (4, 7, 50):
        assert difference(PNDM, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trajectory_and_dtype(name, dtype):
    ours, theirs = pair(name, {})
    ours_samples, theirs_samples = (trajectory(s, 20, start(0, dtype)) for s in (ours, theirs))
    assert [s.dtype for s in ours_samples] == [s.dtype for s in theirs_samples]
    assert ours_samples[-1].dtype == dtype
    assert worst_difference(ours_samples, theirs_samples) <= TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_draws_the_same_noise(eta):
    ours, theirs = pair(DDIM, {})
    one = [trajectory(s, 7, start(), eta=eta, generator=torch.Generator().manual_seed(3)) for s in (ours, theirs)]
    each = [
        trajectory(s, 7, start(), eta=eta, generator=[torch.Generator().manual_seed(i) for i in (4, 5)])
        for s in (ours, theirs)
    ]
    assert worst_difference(*one) <= TOLERANCE
    assert worst_difference(*each) <= TOLERANCE
    assert worst_difference(one[0], each[0]) > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "broken",
    [{"beta_end": 0.012 * (1 + 1e-5)}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}],
    ids=label,
)
def test_comparison_sees_a_small_change(name, broken):
    """Negative control: the comparison fails where one entry differs, even by a hundred-thousandth."""
    ours, theirs = pair(name, broken)[0], pair(name, {"timestep_spacing": "leading"})[1]
    assert worst_difference(trajectory(ours, 7, start()), trajectory(theirs, 7, start())) > TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_comparison_sees_a_changed_model(name):
    """Negative control: a model output off by a hundred-thousandth is found out."""
    ours, theirs = pair(name, {})
    wrong = trajectory(ours, 7, start(), model=lambda x, t: toy_model(x, t) * (1 + 1e-5))
    assert worst_difference(wrong, trajectory(theirs, 7, start())) > TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("source", SCHEDULERS)
def test_from_config_across_classes(source, name):
    """A published PNDM file, through a second class to a third: same entries in force, same pictures."""
    ours = SCHEDULERS[name].from_config(SCHEDULERS[source].from_config(SD15).config)
    theirs = getattr(diffusers, name).from_config(getattr(diffusers, source).from_config(SD15).config)
    effective = ours.config.to_dict()
    assert {key: effective[key] for key in effective if key in theirs.config} == {
        key: theirs.config[key] for key in effective if key in theirs.config
    }
    assert worst_difference(trajectory(ours, 7, start()), trajectory(theirs, 7, start())) <= TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_files_are_read_by_both(name, tmp_path):
    ours, theirs = pair(name, {"timestep_spacing": "trailing"})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    read_by_peer = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    read_by_us = SCHEDULERS[name].from_pretrained(tmp_path / "theirs", subfolder="scheduler")
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written["_class_name"] == name
    assert written.keys() - {"_class_name", "_diffusers_version"} <= dict(theirs.config).keys()
    expected = trajectory(theirs, 7, start())
    for scheduler in (read_by_peer, read_by_us):
        assert worst_difference(trajectory(scheduler, 7, start()), expected) <= TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_add_noise(name):
    ours, theirs = pair(name, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    timesteps = ours.timesteps[[3, 11]]
    a, b = (s.add_noise(start(1), start(2), timesteps) for s in (ours, theirs))
    wrong = ours.add_noise(start(1), start(2), ours.timesteps[[4, 11]])
    assert worst_difference([a], [b]) <= TOLERANCE
    assert worst_difference([wrong], [b]) > TOLERANCE


def test_velocity():
    ours, theirs = pair(DDIM, {})
    timesteps = torch.tensor([20, 900])
    a, b = (s.get_velocity(start(1), start(2), timesteps) for s in (ours, theirs))
    wrong = ours.get_velocity(start(1), start(2), torch.tensor([21, 900]))
    assert worst_difference([a], [b]) <= TOLERANCE
    assert worst_difference([wrong], [b]) > TOLERANCE
