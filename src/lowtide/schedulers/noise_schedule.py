"""The arithmetic of noise schedules, as pure functions: betas and their products, timesteps, and noise levels.

Notation of the papers: ᾱ_t is the product of 1 - β up to t. A sample at noise level t is √ᾱ_t x₀ + √(1-ᾱ_t) ε, which
is called variance-preserving; divided by √ᾱ_t it is x₀ + σ ε with σ² = (1-ᾱ)/ᾱ, called variance-exploding. A sample of
a flow is (1-σ) x₀ + σ ε, with σ from 0 to 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.whole_numbers import whole

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
KARRAS_RHO = 7.0
SMALLEST_ALPHA_BAR = 2.0**-24  # stands for ᾱ = 0 where σ must stay finite: half precision's smallest positive number

FloatArray = NDArray[np.float64]


class NoiseLevel(NamedTuple):
    """One noise level: x = alpha x₀ + sigma ε, and lam = log(alpha / sigma)."""

    alpha: Tensor
    sigma: Tensor
    lam: Tensor


def training_betas(
    schedule: str, start: float, end: float, count: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The `count` betas that the model was trained with, in `dtype`.

    "linear" is DDPM's (arXiv 2006.11239), "scaled_linear" latent diffusion's (linear in √β, arXiv 2112.10752),
    "squaredcos_cap_v2" the cosine schedule of Improved DDPM (arXiv 2102.09672, Eq. 17), which takes no end points.
    """
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=dtype)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=dtype) ** 2
    assert schedule == "squaredcos_cap_v2", schedule
    bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(count)], dtype=dtype)


def cumulative_alphas(betas: Tensor) -> Tensor:
    """ᾱ_t for every training timestep t, ascending in t."""
    return torch.cumprod(1.0 - betas, dim=0)


def shift_snr(alphas_cumprod: Tensor, scale: float) -> Tensor:
    """Divide the signal-to-noise ratio ᾱ/(1-ᾱ) of every timestep by `scale` (arXiv 2403.03206, section 5.3.2)."""
    return alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)


def stretch_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch √ᾱ so that the last timestep is pure noise (arXiv 2305.08891, Algorithm 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """The betas whose products are those of `betas`, stretched to end in pure noise."""
    bar = stretch_to_zero_snr(cumulative_alphas(betas))
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def training_sigmas(alphas_cumprod: Tensor) -> Tensor:
    """σ_t = √((1-ᾱ_t)/ᾱ_t) for every training timestep, ascending in t."""
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


def noise_level(sigma: Tensor) -> NoiseLevel:
    """The variance-preserving level of a variance-exploding `sigma`; lam is infinite where sigma is 0."""
    alpha = 1 / ((sigma**2 + 1) ** 0.5)
    scaled = sigma * alpha
    return NoiseLevel(alpha, scaled, torch.log(alpha) - torch.log(scaled))


def flow_level(sigma: Tensor) -> NoiseLevel:
    """The level of a rectified flow at `sigma`, where alpha + sigma = 1 (arXiv 2403.03206, section 3)."""
    alpha = 1 - sigma
    return NoiseLevel(alpha, sigma, torch.log(alpha) - torch.log(sigma))


def predict_original(kind: str, model_output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x₀ from what the model predicts: noise, v, the velocity of a flow, or x₀ itself.

    For v, alpha² + sigma² = 1 (arXiv 2202.00512, section 4); for a flow, whose velocity is ε - x₀, alpha + sigma = 1.
    """
    if kind == "sample":
        return model_output
    if kind == "v_prediction":
        return alpha * sample - sigma * model_output
    if kind == "flow_prediction":
        return sample - sigma * model_output
    return (sample - sigma * model_output) / alpha


def predict_noise(kind: str, model_output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε from what the model predicts; the counterpart of `predict_original`, but for flows."""
    if kind == "sample":
        return (sample - alpha * model_output) / sigma
    if kind == "v_prediction":
        return alpha * model_output + sigma * sample
    assert kind == "epsilon", kind
    return model_output


def threshold(original: Tensor, ratio: float, largest: float) -> Tensor:
    """Each x₀ of a batch `[B, ...]` clamped to ± its own bound and divided by it (arXiv 2205.11487, section 2.3).

    The bound is the `ratio` quantile of the item's absolute values, but at least 1 and at most `largest`.
    """
    exact = original if original.dtype == torch.float64 else original.float()
    bound = exact.abs().flatten(1).quantile(ratio, dim=1).clamp(1, largest)
    bound = bound.reshape(-1, *[1] * (original.dim() - 1))
    return (exact.clamp(-bound, bound) / bound).to(original.dtype)


def spaced_timesteps(spacing: str, num_steps: int, num_train: int, offset: int) -> FloatArray:
    """`num_steps` falling timesteps below `num_train` (arXiv 2305.08891, Table 2); "linspace" gives fractions."""
    if spacing == "linspace":
        return np.linspace(0, num_train - 1, num_steps)[::-1].copy()
    if spacing == "leading":
        return np.arange(num_steps, dtype=np.float64)[::-1] * (num_train // num_steps) + offset
    return _trailing(num_train, num_train / num_steps)


def solver_timesteps(spacing: str, num_steps: int, num_train: int, offset: int, last: int) -> FloatArray:
    """Falling whole timesteps for solvers that end at a σ of their own: one too many is laid out, the lowest dropped.

    `last` is the number of training timesteps that may be used (all, unless the schedule is clipped).
    """
    if spacing == "linspace":
        return np.linspace(0, last - 1, num_steps + 1).round()[::-1][:-1].copy()
    if spacing == "leading":
        return np.arange(num_steps + 1, dtype=np.float64)[::-1][:-1] * (last // (num_steps + 1)) + offset
    return _trailing(last, num_train / num_steps)


def _trailing(last: int, gap: float) -> FloatArray:
    # Rounding errors in `gap` can add an element just above zero, which would become timestep -1: drop it.
    edges = np.arange(last, 0, -gap).round()
    return edges[edges >= 1] - 1


def karras_sigmas(sigma_max: float, sigma_min: float, num_steps: int) -> FloatArray:
    """Falling sigmas, evenly spaced in σ^(1/7) (arXiv 2206.00364, Eq. 5)."""
    high, low = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return (high + np.linspace(0, 1, num_steps) * (low - high)) ** KARRAS_RHO


def exponential_sigmas(sigma_max: float, sigma_min: float, num_steps: int) -> FloatArray:
    """Falling sigmas, evenly spaced in log σ."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num_steps))


def beta_sigmas(sigma_max: float, sigma_min: float, num_steps: int) -> FloatArray:
    """Falling sigmas at evenly spaced quantiles of a beta distribution, so dense at both ends (arXiv 2407.12173)."""
    return sigma_min + beta_quantiles(1 - np.linspace(0, 1, num_steps)) * (sigma_max - sigma_min)


def beta_quantiles(shares: FloatArray, shape: float = 0.6) -> FloatArray:
    """Where a beta distribution, both of whose parameters are `shape`, reaches `shares` (0…1) of its weight; to 1e-12.

    It is symmetric, so bisection of the lower half does; there the series of the incomplete beta function in powers of
    x (DLMF 8.17.7 and 15.2.1) falls by 2 a term.
    """
    k = np.arange(1, 60)
    series = np.cumprod(np.append(1.0, (k - shape) / k)) / (np.append(0, k) + shape)

    def weight(x: FloatArray) -> FloatArray:
        return x**shape * np.polynomial.polynomial.polyval(x, series)

    wanted = 2 * weight(np.array(0.5)) * np.minimum(shares, 1 - shares)
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = weight(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(shares < 0.5, low, 1 - low)


def shift_flow(sigmas: FloatArray, shift: float) -> FloatArray:
    """A flow's sigmas with all their ratios σ/(1-σ) multiplied by `shift` (arXiv 2403.03206, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretch_to_terminal(sigmas: FloatArray, terminal: float) -> FloatArray:
    """A flow's sigmas, their distances from 1 scaled so that the last one is `terminal`."""
    if sigmas[-1] >= 1:
        raise ValueError("A single step from pure noise cannot end at shift_terminal: ask for two steps or more.")
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))


def timesteps_of_sigmas(sigmas: NDArray[np.floating], training: NDArray[np.floating]) -> FloatArray:
    """The fractional timesteps of `sigmas`, linear in log σ between the `training` sigmas (ascending)."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    return np.interp(logs, np.log(training), np.arange(len(training)))


def check_predicts(kind: str, alpha_bar: Tensor, timestep: int) -> None:
    """Raise `ValueError` where the model predicts noise from pure noise, which says nothing about the clean sample."""
    if alpha_bar == 0 and kind == "epsilon":
        raise ValueError(
            f"Timestep {timestep} is pure noise (rescale_betas_zero_snr), where prediction_type='epsilon' says "
            "nothing about the picture: use prediction_type='v_prediction' or timestep_spacing='leading'."
        )


def check_num_steps(num_steps: int | None, num_train: int, least: int = 1) -> int:
    """The number of steps; raises `ValueError` unless it is whole, from `least` to `num_train`."""
    number = whole(num_steps)
    if number is None or not least <= number <= num_train:
        raise ValueError(
            f"num_inference_steps={num_steps!r:.80} is not possible: choose from {least} to {num_train} "
            f"(the model was trained with {num_train} timesteps)."
        )
    return number


def check_told(timesteps: FloatArray, num_train: int) -> None:
    """Raise `ValueError` unless `timesteps` that were told are some, and lie in 0…`num_train`-1."""
    if timesteps.ndim != 1 or len(timesteps) == 0 or timesteps.min() < 0 or timesteps.max() > num_train - 1:
        raise ValueError(
            f"timesteps={timesteps.tolist()!s:.200} are not possible: give numbers within 0…{num_train - 1}."
        )


def check_flow_sigmas(sigmas: FloatArray) -> None:
    """Raise `ValueError` unless `sigmas` that were told are some, and fall strictly from at most 1 to above 0."""
    if sigmas.ndim != 1 or len(sigmas) == 0 or sigmas[0] > 1 or not np.all(np.diff(sigmas, append=0) < 0):
        raise ValueError(
            f"sigmas={sigmas.tolist()!s:.200} are not possible: those of a flow fall from at most 1, and end above 0."
        )


def check_timesteps(timesteps: NDArray[np.floating], num_train: int, spacing: str) -> None:
    """Raise `ValueError` unless `timesteps` fall strictly and lie in 0…`num_train`-1."""
    if len(timesteps) and timesteps[0] < num_train and timesteps[-1] >= 0 and np.all(np.diff(timesteps) < 0):
        return
    shown = f"{timesteps[0]:g} to {timesteps[-1]:g}" if len(timesteps) else "none"
    raise ValueError(
        f"These steps do not fit the training schedule: timestep_spacing={spacing!r} gives {len(timesteps)} timesteps "
        f"({shown}), which must fall strictly within 0…{num_train - 1}. "
        "Ask for fewer steps, a smaller steps_offset, or timestep_spacing='trailing'."
    )
