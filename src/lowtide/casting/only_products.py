"""Which layers do nothing with their weight but multiply by it, so that another kernel can do it."""

from __future__ import annotations

from torch import nn

from lowtide.memory.weight import Weight


def can_multiply(weight: Weight) -> bool:
    """Whether hardware can multiply by a weight in fp8, and its layers do nothing else with it."""
    layers = [view.slot.owner for view in weight.views]
    return len(layers) == 1 and only_multiplies(layers[0]) and all(size % 16 == 0 for size in weight.views[0].shape)


def only_multiplies(layer: nn.Module) -> bool:
    """Whether a linear layer's call is a product and nothing else, whatever computes it."""
    is_product = type(layer).forward is nn.Linear.forward or getattr(type(layer), "only_multiplies", False)
    return isinstance(layer, nn.Linear) and is_product and "forward" not in vars(layer)
