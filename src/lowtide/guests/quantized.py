"""Networks whose weights are in a form of a library's own, such as torchao, GGUF or bitsandbytes: these stay resident.

Such weights are objects, not rows of numbers, so they are not moved as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.memory.module_weights import is_plain
from lowtide.planning.workload import Component, UnitSize
from lowtide.weights.slots import slots


def bytes_where_quantized(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """The bytes of the weights of those networks that have quantized ones, by name."""
    return {
        name: sum(map(_nbytes, _distinct(network)))
        for name, network in networks.items()
        if not all(map(is_plain, slots(network)))
    }


def _distinct(network: nn.Module) -> Iterator[torch.Tensor]:
    yield from {id(slot.tensor): slot.tensor for slot in slots(network)}.values()


def _nbytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.itemsize


def that_stays(component: Component, nbytes: int) -> Component:
    """A component whose weights take so many bytes and cannot be moved."""
    share = nbytes / max(1, component.nbytes)
    units = {level: tuple(_shrunk(unit, share) for unit in parts) for level, parts in component.units.items()}
    return replace(component, units=units, castings={}, in_file=False, movable=False)


def _shrunk(unit: UnitSize, share: float) -> UnitSize:
    return replace(unit, **{name: int(share * getattr(unit, name)) for name in ("nbytes", "resting", "copied", "leaf")})


def with_plain_linears(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network on meta, with ordinary linears where weights are packed: another shape than their layers say."""
    for module in network.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None:
            shape = (module.out_features, module.in_features)
            if tuple(weight.shape) != shape:
                empty = torch.empty(shape, dtype=dtype, device="meta")
                module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
                module.__dict__["forward"] = nn.Linear.forward.__get__(module)
    return network
