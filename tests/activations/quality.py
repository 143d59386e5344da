"""How near two maps are."""

import torch


def psnr(ours, whole):
    """Decibels, against the range of the second."""
    a, b = ours.double(), whole.double()
    extent, error = (b.max() - b.min()).clamp_min(1e-30), (a - b).square().mean()
    return float(10 * torch.log10(extent**2 / error.clamp_min(1e-300)))


def worst(ours, whole):
    """The largest error, as a share of the range of the second."""
    a, b = ours.double(), whole.double()
    return float((a - b).abs().max() / (b.max() - b.min()).clamp_min(1e-30))
