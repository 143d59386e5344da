"""Networks whose weights are in a form of a library's own, such as torchao, GGUF or bitsandbytes: these stay resident.

Such weights are objects, not rows of numbers, so they are not moved as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def with_plain_linears(twin: nn.Module, network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The `twin` on meta of a network, with ordinary linears where weights are of another shape than layers say.

    Those are packed. Linears of GGUF go on unpacking them, so that what this takes is seen.
    """
    for module, own in zip(twin.modules(), network.modules(), strict=True):
        weight, packed = module._parameters.get("weight"), own._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None:
            shape = (module.out_features, module.in_features)
            if tuple(weight.shape) != shape or hasattr(packed, "quant_type"):
                empty = torch.empty(shape, dtype=dtype, device="meta")
                module._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
                module.__dict__["forward"] = _forward(module, packed)
                module.__dict__["_lowtide_kind"] = getattr(packed, "quant_type", None)  # layers of others are others
    return twin


def _forward(module: nn.Linear, packed: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a linear whose weights are packed like this does on meta."""
    if not hasattr(packed, "quant_type"):
        return nn.Linear.forward.__get__(module)
    on_meta = torch.empty(packed.shape, dtype=packed.dtype, device="meta")
    stand_in = type(packed)(on_meta, quant_type=packed.quant_type)

    def unpacked(inputs: torch.Tensor) -> torch.Tensor:
        plain = module._parameters["weight"]
        module._parameters["weight"] = stand_in
        try:
            return type(module).forward(module, inputs)
        finally:
            module._parameters["weight"] = plain

    return unpacked
