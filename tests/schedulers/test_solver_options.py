"""Algorithms, flows, spacings and bounds that some schedulers can be asked for: what must hold for all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.schedulers.test_scheduler_steps import held_tensors
from tests.schedulers.trajectories import AT_SIGMA_MIN, FLOW, draws, seeded, start, toy_model, trajectory

from lowtide.schedulers import SCHEDULERS, noise_schedule

DDIM, PNDM, UNIPC, EULER, DPM, *_ = SCHEDULERS
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BOUNDED = {"thresholding": True, "sample_max_value": 2.0}
OPTIONS = {
    "SDE": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "SDE, heun": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "SDE, order 3": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "SDE of the noise": (DPM, {"algorithm_type": "sde-dpmsolver", **AT_SIGMA_MIN}),
    "of the noise": (DPM, {"algorithm_type": "dpmsolver", **AT_SIGMA_MIN}),
    "of the noise, order 3": (DPM, {"algorithm_type": "dpmsolver", "solver_order": 3, **AT_SIGMA_MIN}),
    "Lu": (DPM, {"use_lu_lambdas": True}),
    "SDE, Karras": (DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, **AT_SIGMA_MIN}),
    "SDE, beta": (DPM, {"algorithm_type": "sde-dpmsolver", "use_beta_sigmas": True, **AT_SIGMA_MIN}),
    "flow, DPM": (DPM, {**FLOW, "flow_shift": 3.0}),
    "flow, DPM, SDE": (DPM, {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "flow, UniPC": (UNIPC, {**FLOW, "flow_shift": 3.0}),
    "flow, UniPC, Karras": (UNIPC, {**FLOW, "use_karras_sigmas": True}),
    "flow, UniPC, terminal": (UNIPC, {**FLOW, "shift_terminal": 0.01}),
    "beta, DPM": (DPM, {"use_beta_sigmas": True}),
    "beta, UniPC": (UNIPC, {"use_beta_sigmas": True}),
    "beta, Euler": (EULER, {"use_beta_sigmas": True}),
    "log-linear": (EULER, {"interpolation_type": "log_linear"}),
    "continuous": (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    "bounded, DDIM": (DDIM, BOUNDED),
    "bounded, DPM": (DPM, BOUNDED),
    "bounded, DPM, of the noise": (DPM, {**BOUNDED, "algorithm_type": "dpmsolver", **AT_SIGMA_MIN}),
    "bounded, UniPC": (UNIPC, BOUNDED),
}
DETERMINISTIC = [option for option, (name, entries) in OPTIONS.items() if not draws(name, entries)]
EXACT = [option for option in OPTIONS if not option.startswith("bounded") and option != "log-linear"]


def build(option):
    name, entries = OPTIONS[option]
    return SCHEDULERS[name].from_config({**BASE, **entries})


def repeatable(option):
    return seeded(*OPTIONS[option])


def level(scheduler, place):
    """The noise level of a sample as the model sees it, x = alpha x₀ + sigma ε; `place` counts from the first."""
    flow = scheduler.config.get("use_flow_sigmas")
    return (noise_schedule.flow_level if flow else noise_schedule.noise_level)(scheduler.sigmas[place].double())


def model_of(scheduler, original):
    """A model that predicts the clean sample `original(x, alpha, sigma)`, and the noise that is left."""

    def model(sample, t):
        alpha, sigma, _ = level(scheduler, scheduler.step_index or 0)
        clean = original(sample.double(), alpha, sigma)
        noise = (sample.double() - alpha * clean) / sigma
        velocities = {"v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean}
        return {"epsilon": noise, **velocities}[scheduler.config.prediction_type].float()

    return model


@pytest.mark.parametrize("option", EXACT)
def test_a_model_that_knows_the_clean_sample_leads_to_it(option):
    """Along a straight line, where a run ends above σ = 0: to the same sample with less of the same noise."""
    scheduler, clean = build(option), start(1).double()
    for num_steps in (2, 7, 30):
        knows, errs = (model_of(scheduler, lambda *_, size=size: size * clean) for size in (1, 0.99))
        samples = trajectory(scheduler, num_steps, start(2), model=knows, **repeatable(option))
        (alpha, sigma, _), (alpha_end, sigma_end, _) = (level(scheduler, place) for place in (0, num_steps))
        if sigma_end > 0 and option not in DETERMINISTIC:
            continue
        noise = (samples[0].double() - alpha * clean) / sigma
        expected = alpha_end * clean + sigma_end * noise
        assert (samples[-1] - expected).abs().max() < 2e-4
        wrong = trajectory(scheduler, num_steps, start(2), model=errs, **repeatable(option))
        assert (wrong[-1] - expected).abs().max() > 2e-3  # negative control


SPREAD = 0.7
"""The standard deviation of the Gaussian samples that the model below was "trained" on."""


def gaussian_model(scheduler, size=1.0):
    """The best predictions there are for such samples, times `size`; with them the exact solution is known."""
    variance = SPREAD**2
    return model_of(scheduler, lambda x, alpha, sigma: x * size * alpha * variance / (alpha**2 * variance + sigma**2))


def deviation(scheduler, place):
    """The standard deviation of the noisy sample over alpha, which the exact solution is proportional to, and alpha."""
    alpha, sigma, _ = level(scheduler, place)
    return (SPREAD**2 + (sigma / alpha) ** 2) ** 0.5, alpha if scheduler.init_noise_sigma == 1 else 1.0


def error(option, num_steps, size=1.0):
    """How far an ODE's end is from the exact solution, relative to that."""
    scheduler = build(option)
    samples = trajectory(scheduler, num_steps, start(2), model=gaussian_model(scheduler, size))
    (first, alpha), (last, alpha_end) = (deviation(scheduler, place) for place in (0, num_steps))
    exact = samples[0].double() / alpha * (last / first) * alpha_end
    return float((samples[-1] - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("option", [option for option in EXACT if option in DETERMINISTIC])
def test_more_steps_come_nearer_to_the_exact_solution(option):
    near = error(option, 10) / 5
    assert error(option, 80) < near
    assert error(option, 80, size=0.9) > near  # negative control


def ending(option, num_steps, size=1.0):
    """The standard deviation of an SDE's end over that of the exact solution, from fresh noise of `size`."""
    scheduler, generator = build(option), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(num_steps)
    (first, alpha), (last, alpha_end) = (deviation(scheduler, place) for place in (0, num_steps))
    sample, model = torch.randn(1, 1, 128, 128, generator=generator) * float(first * alpha), gaussian_model(scheduler)
    for t in scheduler.timesteps:
        fresh = size * torch.randn(sample.shape, generator=generator)
        sample = scheduler.step(model(sample, t), t, sample, variance_noise=fresh).prev_sample
    return float(sample.double().std() / (last * alpha_end))


@pytest.mark.parametrize(
    "option", [option for option in EXACT if option not in DETERMINISTIC and "order" not in option]
)
def test_an_sde_ends_in_samples_of_the_right_spread(option):
    """But of third order, whose published weights are not those of the integral; see `dpm_step`."""
    near = abs(ending(option, 80) - 1)
    assert near < min(abs(ending(option, 5) - 1), 0.03)
    assert abs(ending(option, 80, size=0.9) - 1) > 0.06  # negative control


@pytest.mark.parametrize(
    "numbers", [(*range(1, 9), 30), pytest.param((*range(9, 30), 50), marks=pytest.mark.slow)], ids=max
)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_number_of_steps_gives_finite_samples(option, numbers):
    """Also where rounded timesteps repeat, and where the last step has no length; the peer gives NaN there."""
    scheduler, least = build(option), 2 if option == "flow, UniPC, terminal" else 1
    for num_steps in (number for number in numbers if number >= least):
        samples = trajectory(scheduler, num_steps, start(num_steps, shape=(1, 1, 2, 2)), **repeatable(option))
        assert samples[-1].isfinite().all(), num_steps
        assert len(samples) - 1 == num_steps
        assert (scheduler.timesteps.diff() <= 0).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_second_run_equals_the_first_and_keeps_nothing(option):
    scheduler = build(option)
    before = held_tensors(scheduler)
    first = trajectory(scheduler, 7, start(), **repeatable(option))
    assert held_tensors(scheduler) == before
    scheduler.set_timesteps(5)  # a run broken off after two steps must leave no trace
    for t in scheduler.timesteps[:2]:
        scheduler.step(toy_model(scheduler.scale_model_input(start(), t), t), t, start())
    assert torch.equal(trajectory(scheduler, 7, start(), **repeatable(option))[-1], first[-1])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_configuration_survives_a_file(option, tmp_path):
    scheduler = build(option)
    scheduler.save_pretrained(tmp_path)
    read = type(scheduler).from_pretrained(tmp_path)
    assert read.config.to_dict() == scheduler.config.to_dict()
    assert torch.equal(
        trajectory(read, 4, start(), **repeatable(option))[-1],
        trajectory(scheduler, 4, start(), **repeatable(option))[-1],
    )


@pytest.mark.parametrize("option", ["flow, DPM", "flow, UniPC"])
def test_noise_is_added_as_a_flow_has_it(option):
    scheduler, clean, noise = build(option), start(1), start(2)
    training = scheduler.add_noise(clean, noise, torch.tensor([250]))
    assert torch.allclose(training, 0.75 * clean + 0.25 * noise)
    scheduler.set_timesteps(8)
    noisy = scheduler.add_noise(clean, noise, scheduler.timesteps[[2, 5]])
    sigma = scheduler.sigmas[[2, 5]].reshape(2, 1, 1, 1)
    assert torch.allclose(noisy, (1 - sigma) * clean + sigma * noise)
    assert not torch.allclose(noisy[:1], training[:1])  # negative control


# ---- what they are built of

QUANTILES = {
    0.6: {0: 0, 1e-6: 1.8558824624053043e-10, 0.01: 0.0008612388215429059, 0.25: 0.17568037865269498, 0.5: 0.5,
          0.75: 0.824319621347305, 0.99: 0.9991387611784571, 1: 1},
    2.0: {0.1: 0.19580010565909173, 0.4: 0.43293107714773177, 0.99: 0.9410968642218047},
}  # fmt: skip
"""Parameters of a beta distribution -> share -> quantile, by scipy 1.17.1."""


@pytest.mark.parametrize("shape", QUANTILES)
def test_quantiles_of_beta_distributions_are_those_of_scipy(shape):
    shares, expected = (np.array(list(part)) for part in (QUANTILES[shape], QUANTILES[shape].values()))
    assert np.abs(noise_schedule.beta_quantiles(shares, shape=shape) - expected).max() < 1e-12
    assert np.abs(noise_schedule.beta_quantiles(shares, shape=shape + 1e-3) - expected).max() > 1e-6  # negative control


def test_each_item_is_bounded_by_its_own_values():
    """Values spread evenly to ±`top`, whose 90 % quantile is 0.9 `top`."""
    flat = torch.linspace(-1, 1, 2001).reshape(1, 3, 23, 29)
    for top, bound in ((0.5, 1.0), (2.0, 1.8), (9.0, 4.0)):
        both = torch.cat([flat * top, flat * 0.1])
        bounded = noise_schedule.threshold(both, 0.9, 4.0)
        assert torch.allclose(bounded[0], (flat[0] * top).clamp(-bound, bound) / bound, atol=1e-3)
        assert torch.equal(bounded[1], both[1])
        assert noise_schedule.threshold(both.bfloat16(), 0.9, 4.0).dtype == torch.bfloat16


def test_variances_that_a_model_predicts_are_left_out():
    plain, learned = (SCHEDULERS[DPM](variance_type=kind) for kind in (None, "learned_range"))
    four = start(shape=(2, 4, 5, 3))
    expected = trajectory(plain, 5, four)
    ends = trajectory(learned, 5, four, model=lambda x, t: torch.cat([toy_model(x, t), x], dim=1))
    assert all(map(torch.equal, ends, expected))
    with pytest.raises(RuntimeError, match="size of tensor"):
        trajectory(plain, 5, four, model=lambda x, t: torch.cat([toy_model(x, t), x], dim=1))


DYNAMIC = {**FLOW, "use_dynamic_shifting": True}


THREE = {"num_inference_steps": 3}
LINEAR = {**DYNAMIC, "time_shift_type": "linear"}


@pytest.mark.parametrize(
    ("name", "entries", "told", "message"),
    [
        (DPM, {}, {**THREE, "mu": 1.0}, r"mu=1\.0 is possible only with use_dynamic_shifting=True"),
        (DPM, DYNAMIC, {**THREE, "mu": 99}, r"mu=99 is not possible: give a number from -6\.908 to 6\.908"),
        (DPM, FLOW, {"timesteps": [9, 5]}, "not possible where sigmas are spaced: leave out use_flow_sigmas"),
        (DPM, {"use_lu_lambdas": True}, {"timesteps": [9, 5]}, "leave out use_lu_lambdas"),
        (UNIPC, {}, {**THREE, "mu": 1.0}, "sigmas and mu are possible only with use_flow_sigmas=True"),
        (UNIPC, {}, {"sigmas": [0.5]}, "sigmas and mu are possible only with use_flow_sigmas=True"),
        (UNIPC, FLOW, {**THREE, "mu": 1.0}, r"mu=1\.0 is possible only with use_dynamic_shifting=True"),
        (UNIPC, DYNAMIC, THREE, "use_dynamic_shifting=True needs mu"),
        (UNIPC, LINEAR, {**THREE, "mu": 0}, r"mu=0 is not possible: give a number from 0\.001 to 1000"),
        (UNIPC, FLOW, {"sigmas": [0.5, 0.6]}, r"sigmas=\[0\.5, 0\.6\] are not possible: those of a flow fall"),
        (UNIPC, FLOW, {"sigmas": [0.5, 0.0]}, "end above 0"),
        (UNIPC, FLOW, {"sigmas": []}, "end above 0"),
        (UNIPC, FLOW, {"sigmas": [0.5], **THREE}, "num_inference_steps and sigmas are both given"),
        (UNIPC, {**FLOW, "use_karras_sigmas": True}, {"sigmas": [0.5]}, "leave out use_karras_sigmas"),
        (UNIPC, {**FLOW, "shift_terminal": 0.1}, {"num_inference_steps": 1}, "ask for two steps or more"),
        (UNIPC, FLOW, {}, "num_inference_steps=None is not possible"),
        (EULER, {"use_beta_sigmas": True}, {"timesteps": [9, 5]}, "leave out use_beta_sigmas"),
        (EULER, OPTIONS["continuous"][1], {"timesteps": [9, 5]}, "timestep_type='continuous': give sigmas"),
    ],
)
def test_what_cannot_be_told_is_refused(name, entries, told, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULERS[name](**entries).set_timesteps(**told)


def test_sigmas_may_be_a_list():
    for name, entries, sigmas in ((UNIPC, FLOW, [1.0, 0.5, 0.25]), (EULER, {}, [12.0, 3.0, 0.0])):
        scheduler = SCHEDULERS[name](**entries)
        assert len(trajectory(scheduler, None, start(), told={"sigmas": sigmas})) - 1 == len(scheduler.timesteps)
        assert torch.allclose(scheduler.sigmas[1:3], torch.tensor(sigmas[1:3]))


@pytest.mark.parametrize("option", OPTIONS)
def test_samples_on_an_accelerator_equal_those_on_the_cpu(option, device):
    scheduler = build(option)
    expected = trajectory(scheduler, 7, start(), **repeatable(option))[-1]
    ends = trajectory(scheduler, 7, start().to(device), told={"device": device}, **repeatable(option))[-1]
    assert ends.device == device
    assert (ends.cpu() - expected).abs().max() < 1e-5 * max(expected.abs().max(), 1)
