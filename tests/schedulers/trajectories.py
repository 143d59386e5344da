"""A fixed nonlinear "model" and the loop around it, for tests that compare whole trajectories of schedulers.

Only exact arithmetic (no random numbers, no transcendental functions), so that goldens hold on every machine.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

SHAPE = (2, 3, 4, 5)
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


COGVIDEOX_5B = {
    "_class_name": "CogVideoXDPMScheduler",
    "_diffusers_version": "0.31.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
ALWAYS_DRAWS = ("CogVideoXDPMScheduler",)  # noise at every step


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
AT_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}  # solvers of the noise cannot end at σ = 0


def draws(name, entries):
    """Whether every step draws noise."""
    return name in ALWAYS_DRAWS or str(entries.get("algorithm_type")).startswith("sde")


def seeded(name, entries=None, seed=0):
    """The options of a step that make a trajectory repeatable."""
    return {"generator": torch.Generator().manual_seed(seed)} if draws(name, entries or {}) else {}


class PeerDPM:
    """The peer's CogVideoX DPM scheduler with the interface of all others: it is told of the step before by hand."""

    def __init__(self, scheduler):
        self.scheduler, self.init_noise_sigma = scheduler, scheduler.init_noise_sigma

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def set_timesteps(self, num_steps):
        self.scheduler.set_timesteps(num_steps)
        self.original = self.before = None

    def step(self, output, t, sample, **options):
        results = self.scheduler.step(output, self.original, t, self.before, sample, **options, return_dict=False)
        self.before, self.original = t, results[1]
        return SimpleNamespace(prev_sample=results[0])


def with_memory(scheduler):
    """One of the peer's schedulers, so that the loop below can drive it."""
    return PeerDPM(scheduler) if type(scheduler).__name__ in ALWAYS_DRAWS else scheduler


def toy_model(sample, timestep):
    """A smooth, bounded stand-in for a UNet, which mixes positions and depends on the timestep."""
    t = float(timestep) / 1000
    inner, neighbour = sample * (0.5 + t), torch.roll(sample, 1, -1)
    return 1.6 * inner / (1 + inner * inner) + 0.4 * (1 - t) * neighbour / (1 + neighbour * neighbour)


def start(seed=0, dtype=torch.float32, shape=SHAPE):
    """Values spread over ±1.7, different for each seed."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 37 + seed * 17) % 101 - 50) / 29).reshape(shape).to(dtype)


def trajectory(scheduler, num_steps, noise, *, model=toy_model, told=None, **step_options):
    """Every sample from the first noise to the last step; the same loop drives the peer's schedulers.

    `told` is what `set_timesteps` is told besides the number of steps, or instead of it (None).
    """
    scheduler.set_timesteps(*([] if num_steps is None else [num_steps]), **(told or {}))
    sample = noise * scheduler.init_noise_sigma
    samples = [sample]
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, **step_options).prev_sample
        samples.append(sample)
    return samples


def worst_difference(ours, theirs):
    """The largest error of any sample on the way, relative to that sample's largest entry."""
    assert len(ours) == len(theirs)
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    errors = torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1e-12) for a, b in pairs])
    assert errors.isfinite().all(), "a trajectory holds NaN or infinity"
    return float(errors.max())
