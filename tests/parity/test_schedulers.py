"""Whole trajectories of our schedulers against the peer's: same calls, same samples."""

import itertools
import json

import pytest
import torch
from tests.parity.pairs import lent_quantiles
from tests.schedulers.trajectories import (
    AT_SIGMA_MIN,
    COGVIDEOX_5B,
    FLOW,
    SD15,
    seeded,
    start,
    toy_model,
    trajectory,
    with_memory,
    worst_difference,
)
from tests.thinned import thinned

from lowtide.schedulers import SCHEDULERS, noise_schedule

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # the peer's own
    pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning"),
]

TOLERANCE = 1e-6
DDIM, PNDM, UNIPC, EULER, DPM, COG_DDIM, COG_DPM = SCHEDULERS
COGVIDEOX = (COG_DDIM, COG_DPM)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN = [case for case in thinned(SCHEDULERS, SPACINGS, PREDICTIONS, BETAS) if case.values[::2] != (PNDM, "sample")]


def of_class(name, entries, keys, *axes):
    """Options of one class, with `entries` in every case: one value of the last axis beside each of the others."""
    return [
        pytest.param(name, {**entries, **dict(zip(keys, case.values, strict=True))}, marks=case.marks)
        for case in thinned(*axes)
    ]


DPM_KEYS = ("solver_order", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type")
DPM_VALUES = (1, 2, 3), ("midpoint", "heun"), (True, False), (True, False), ("zero", "sigma_min")
UNIPC_KEYS = ("solver_order", "solver_type", "predict_x0", "lower_order_final", "disable_corrector")
UNIPC_VALUES = (1, 2, 3), ("bh1", "bh2"), (True, False), (True, False), ([], [0, 2])
ALGORITHMS = [
    {"algorithm_type": a, "solver_order": o, "solver_type": s, "final_sigmas_type": last}
    for a, o, s, last in itertools.product(
        ("sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"), (1, 2, 3), ("midpoint", "heun"), ("zero", "sigma_min")
    )
    if (a.endswith("++") or last != "zero") and (a, o) != ("sde-dpmsolver", 3)
]
BOUNDED = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
OF_FEW = [
    *((DPM, options) for options in ALGORITHMS),
    *(
        (DPM, {"algorithm_type": a, **AT_SIGMA_MIN, **ZERO_SNR})
        for a in ("sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    ),
    *((name, {**BOUNDED, "prediction_type": p}) for name in (DDIM, DPM, UNIPC) for p in PREDICTIONS),
    *((name, {**BOUNDED, "sample_max_value": limit}) for name in (DDIM, DPM, UNIPC) for limit in (0.5, 1.0)),
    (DPM, {**BOUNDED, **AT_SIGMA_MIN, "algorithm_type": "dpmsolver"}),
    (DPM, {**BOUNDED, **FLOW, "algorithm_type": "sde-dpmsolver++"}),
    *(
        (name, {"use_beta_sigmas": True, "final_sigmas_type": f})
        for name in (EULER, DPM, UNIPC)
        for f in ("zero", "sigma_min")
    ),
    *((name, {"use_beta_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}) for name in (EULER, UNIPC)),
    (DPM, {"use_lu_lambdas": True}),
    (DPM, {"use_lu_lambdas": True, "algorithm_type": "sde-dpmsolver++"}),
    *(
        (name, {**FLOW, "flow_shift": s, "solver_order": o})
        for name in (DPM, UNIPC)
        for s in (0.3, 1.0, 12.0)
        for o in (1, 2, 3)
    ),
    *((name, {**FLOW, "prediction_type": p}) for name in (DPM, UNIPC) for p in ("epsilon", "sample")),
    (DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    (UNIPC, {**FLOW, "final_sigmas_type": "sigma_min"}),
    (UNIPC, {**FLOW, "use_karras_sigmas": True}),
    (UNIPC, {**FLOW, "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}),
    *((UNIPC, {**FLOW, "shift_terminal": end, "flow_shift": 3.0}) for end in (0.02, 0.1)),
    *(
        (EULER, {"interpolation_type": "log_linear", **o})
        for o in ({}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True})
    ),
    *((EULER, {"timestep_type": "continuous", "prediction_type": p}) for p in PREDICTIONS),
    *((EULER, {"timestep_type": "continuous", **ZERO_SNR, "use_karras_sigmas": k}) for k in (True, False)),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction", "interpolation_type": "log_linear"}),
]
SPECIAL = [
    *of_class(DPM, {}, DPM_KEYS, *DPM_VALUES),
    *of_class(UNIPC, {"final_sigmas_type": "sigma_min"}, UNIPC_KEYS, *UNIPC_VALUES),
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
    *((name, {**COGVIDEOX_5B, "snr_shift_scale": shift}) for name in (COG_DDIM, COG_DPM) for shift in (1.0, 3.0, 7.5)),
    *(
        (name, {"rescale_betas_zero_snr": True, "prediction_type": p, "timestep_spacing": s, "snr_shift_scale": 1.0})
        for name in (COG_DDIM, COG_DPM)
        for p in ("v_prediction", "sample")
        for s in SPACINGS
    ),
    *((name, {"set_alpha_to_one": False, "clip_sample": True}) for name in (COG_DDIM, COG_DPM)),
    *(
        (name, {"num_train_timesteps": 300, "trained_betas": [0.0001 + 0.00004 * i for i in range(300)]})
        for name in (COG_DDIM, COG_DPM)
    ),
    (PNDM, {"num_train_timesteps": 300, "trained_betas": [0.0001 + 0.00004 * i for i in range(300)]}),
]


def pair(name, entries):
    """Our scheduler and the peer's, from the same entries."""
    entries = {key: value for key, value in {**BASE, **entries}.items() if not key.startswith("_")}
    if name == PNDM:
        entries = {"skip_prk_steps": True, **entries}
    return SCHEDULERS[name].from_config(entries), with_memory(getattr(diffusers, name)(**entries))


def difference(name, entries, num_steps, dtype=torch.float32):
    ours, theirs = pair(name, entries)
    noise = start(num_steps, dtype)
    return worst_difference(*(trajectory(s, num_steps, noise, **seeded(name, entries)) for s in (ours, theirs)))


def label(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


@pytest.mark.parametrize("steps", [(1, 2, 3, 7, 20), pytest.param((50,), marks=pytest.mark.slow)], ids=max)
@pytest.mark.parametrize(("name", "spacing", "prediction", "betas"), PLAIN)
def test_trajectory(name, spacing, prediction, betas, steps):
    entries = {"timestep_spacing": spacing, "prediction_type": prediction, "beta_schedule": betas, "steps_offset": 1}
    for num_steps in steps:
        assert difference(name, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize(("name", "entries"), SPECIAL, ids=label)
def test_trajectory_with_options(name, entries):
    for num_steps in (2, 7, 20):
        assert difference(name, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize(("name", "entries"), OF_FEW, ids=label)
def test_trajectory_with_options_of_few(name, entries, monkeypatch):
    """Those of one or two classes."""
    lent_quantiles(monkeypatch)
    for num_steps in (2, 7, 20):
        assert difference(name, entries, num_steps) <= TOLERANCE, num_steps


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_sde_draws_the_same_noise(algorithm, dtype):
    """One generator or one for each item, or noise that is given; in float32, whatever the samples are in."""
    ours, theirs = pair(DPM, {"algorithm_type": algorithm, **AT_SIGMA_MIN})

    def run(scheduler, *seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if seeds:
            options["generator"] = generators[0] if len(seeds) == 1 else generators
        samples = trajectory(scheduler, 7, start(0, dtype), **options)
        return samples, [one.get_state() for one in generators]

    for call in (((3,), {}), ((4, 5), {}), ((), {"variance_noise": start(6)}), ((3,), {"variance_noise": start(6)})):
        (a, used), (b, used_by_peer) = (run(scheduler, *call[0], **call[1]) for scheduler in (ours, theirs))
        assert worst_difference(a, b) <= TOLERANCE
        assert all(map(torch.equal, used, used_by_peer))
        assert [x.dtype for x in a] == [x.dtype for x in b]
    assert worst_difference(run(ours, 3)[0], run(theirs, 4)[0]) > 0.01  # negative control


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
    ours_samples, theirs_samples = (trajectory(s, 20, start(0, dtype), **seeded(name)) for s in (ours, theirs))
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


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [torch.float32, None], ids=["float32 outputs", "outputs in the dtype"])
def test_cogvideox_dpm_draws_the_same_noise(kind, dtype, outputs):
    """One generator or one for each item; outputs in float32 and samples cast back, as the peer's pipeline does."""

    def model(sample, t):
        return toy_model(sample.to(dtype), t).to(outputs or dtype)

    def run(scheduler, seeds):
        seeds = [torch.Generator().manual_seed(seed) for seed in seeds]
        generator = seeds[0] if len(seeds) == 1 else seeds
        samples = trajectory(scheduler, 20, start(0, dtype), model=model, generator=generator)
        return samples, torch.stack([one.get_state() for one in seeds])

    changes = {"prediction_type": kind, "rescale_betas_zero_snr": kind != "epsilon"}
    ours, theirs = pair(COG_DPM, {**COGVIDEOX_5B, **changes})
    for seeds in ((3,), (4, 5)):
        (a, used), (b, used_by_peer) = run(ours, seeds), run(theirs, seeds)
        assert worst_difference(a, b) <= TOLERANCE
        assert torch.equal(used, used_by_peer)
        assert [s.dtype for s in a] == [s.dtype for s in b]
    assert worst_difference(run(ours, (3,))[0], run(theirs, (4, 5))[0]) > 0.01  # negative control


def test_cogvideox_dpm_comparison_sees_a_single_draw(monkeypatch):
    """Negative control: with noise drawn once a step instead of twice, the trajectories part."""
    ours, theirs = pair(COG_DPM, COGVIDEOX_5B)
    drawn = []

    def once(sample, generator):
        if len(drawn) % 2 == 0 or not drawn:
            drawn.append(torch.randn(sample.shape, generator=generator, dtype=sample.dtype))
            return drawn[-1]
        return drawn.pop()

    monkeypatch.setattr(ours, "_draw", once)
    assert worst_difference(*(trajectory(s, 7, start(), **seeded(COG_DPM)) for s in (ours, theirs))) > 0.01


@pytest.mark.parametrize("name", [COG_DDIM, COG_DPM])
def test_cogvideox_comparison_sees_the_order_of_shift_and_rescaling(name):
    """Negative control: the schedule is shifted first, then stretched to end in pure noise."""
    ours, theirs = pair(name, {**COGVIDEOX_5B, "snr_shift_scale": 3.0})
    stretched = noise_schedule.stretch_to_zero_snr(pair(name, {"snr_shift_scale": 1.0})[0].alphas_cumprod)
    assert worst_difference([ours.alphas_cumprod], [theirs.alphas_cumprod]) <= TOLERANCE
    assert worst_difference([noise_schedule.shift_snr(stretched, 3.0)], [theirs.alphas_cumprod]) > 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "broken",
    [{"beta_end": 0.012 * (1 + 1e-5)}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}],
    ids=label,
)
def test_comparison_sees_a_small_change(name, broken):
    """Negative control: the comparison fails where one entry differs, even by a hundred-thousandth."""
    ours, theirs = pair(name, broken)[0], pair(name, {"timestep_spacing": "leading"})[1]
    assert worst_difference(*(trajectory(s, 7, start(), **seeded(name)) for s in (ours, theirs))) > TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_comparison_sees_a_changed_model(name):
    """Negative control: a model output off by a hundred-thousandth is found out."""
    ours, theirs = pair(name, {})
    wrong = trajectory(ours, 7, start(), model=lambda x, t: toy_model(x, t) * (1 + 1e-5), **seeded(name))
    assert worst_difference(wrong, trajectory(theirs, 7, start(), **seeded(name))) > TOLERANCE


def across(source, name, entries):
    """Our scheduler `name` and the peer's, each built from the configuration of its `source`."""
    ours = SCHEDULERS[name].from_config(SCHEDULERS[source].from_config(entries).config)
    theirs = getattr(diffusers, name).from_config(getattr(diffusers, source).from_config(entries).config)
    return ours, with_memory(theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("source", SCHEDULERS)
def test_from_config_across_classes(source, name):
    """A published PNDM file, through a second class to a third: same entries in force, same pictures.

    The peer loses CogVideoX's shift of the noise on the way, and we keep it: so to and fro the file tells of none.
    """
    entries = SD15 if (source in COGVIDEOX) == (name in COGVIDEOX) else {**SD15, "snr_shift_scale": 1.0}
    ours, theirs = across(source, name, entries)
    effective = ours.config.to_dict()
    assert {key: effective[key] for key in effective if key in theirs.config} == {
        key: theirs.config[key] for key in effective if key in theirs.config
    }
    assert worst_difference(*(trajectory(s, 7, start(), **seeded(name)) for s in (ours, theirs))) <= TOLERANCE


@pytest.mark.parametrize("name", [DDIM, UNIPC, EULER, DPM])
@pytest.mark.parametrize("source", COGVIDEOX)
def test_the_shift_is_kept_where_the_peer_loses_it(source, name):
    """The peer's scheduler has the noise of its source only if it is handed the shifted betas."""
    ours, theirs = across(source, name, SD15)
    shifted = getattr(diffusers, source).from_config(SD15).alphas_cumprod
    assert worst_difference([ours.alphas_cumprod], [shifted]) <= TOLERANCE
    assert worst_difference([theirs.alphas_cumprod], [shifted]) > 0.1
    betas = 1 - torch.cat([shifted[:1], shifted[1:] / shifted[:-1]])
    corrected = getattr(diffusers, name).from_config({**SD15, "trained_betas": betas.tolist()})
    assert worst_difference(*(trajectory(s, 7, start()) for s in (ours, corrected))) <= 1e-4
    assert worst_difference(*(trajectory(s, 7, start()) for s in (theirs, corrected))) > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_files_are_read_by_both(name, tmp_path):
    ours, theirs = pair(name, {"timestep_spacing": "trailing"})
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    read_by_peer = with_memory(getattr(diffusers, name).from_pretrained(tmp_path / "ours"))
    read_by_us = SCHEDULERS[name].from_pretrained(tmp_path / "theirs", subfolder="scheduler")
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written["_class_name"] == name
    assert written.keys() - {"_class_name", "_diffusers_version"} <= dict(theirs.config).keys()
    expected = trajectory(theirs, 7, start(), **seeded(name))
    for scheduler in (read_by_peer, read_by_us):
        assert worst_difference(trajectory(scheduler, 7, start(), **seeded(name)), expected) <= TOLERANCE


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


@pytest.mark.parametrize("name", [DDIM, COG_DDIM, COG_DPM])
def test_velocity(name):
    ours, theirs = pair(name, {})
    timesteps = torch.tensor([20, 900])
    a, b = (s.get_velocity(start(1), start(2), timesteps) for s in (ours, theirs))
    wrong = ours.get_velocity(start(1), start(2), torch.tensor([21, 900]))
    assert worst_difference([a], [b]) <= TOLERANCE
    assert worst_difference([wrong], [b]) > TOLERANCE
