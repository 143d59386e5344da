"""One component of a guest before it is loaded: a network without weights, and where these are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.guests.conversions import Converted
from lowtide.guests.packed_files import Packed
from lowtide.planning.plan import Budgets
from lowtide.sizes import format_decimal
from lowtide.weights.files import InFile
from lowtide.weights.index import CheckpointIndex, TensorEntry
from lowtide.weights.slots import slots


@dataclass(frozen=True)
class Part:
    """One component: as it is if it is no network, else a network without weights, and where these are.

    `index` is None for what its own library loads, with `reason` saying why, and for weights that are not here, as in
    a folder of configurations. Weights compute in `dtype`, None for that of the files; `keep` are patterns of the names
    of those that stay float32. Weights that are in no folder of the component's own are in `file`, `converted` or
    `packed` there.
    """

    built: Any
    index: CheckpointIndex | None = None
    dtype: torch.dtype | None = None
    keep: tuple[str, ...] = ()
    reason: str = ""
    is_here: bool = True
    file: Path | None = None
    converted: Converted | None = None
    packed: Packed | None = None

    @property
    def computed(self) -> list[str]:
        """Names of buffers that the files could hold and do not: they are as the class computes them."""
        held = () if self.index is None else self.index
        return [slot.name for slot in slots(self.built) if slot.kind == "buffer" and slot.name not in held]


def beside_computed(parts: Mapping[str, Part], budgets: Budgets) -> Budgets:
    """The budgets that are left once weights which are computed of several in a file lie in a file of their own."""
    sizes = {name: part.converted.nbytes for name, part in parts.items() if part.converted is not None}
    needed = sum(sizes.values())
    if budgets.disk is None or not needed:
        return budgets
    if needed > budgets.disk:
        names = ", ".join(name for name, size in sizes.items() if size)
        raise ValueError(
            f"disk={format_decimal(budgets.disk)} is not enough: some weights of {names} are computed of several in "
            f"their file, and need a temporary file of {format_decimal(needed)}."
        )
    return replace(budgets, disk=budgets.disk - needed)


def computed_in(index: Mapping[str, TensorEntry], beside: Mapping[str, TensorEntry]) -> torch.dtype | None:
    """The dtype that weights compute in of which some are in 8 bits: that of the first others, also of those `beside`.

    None where there are no such, since all compute in their own.
    """
    in_8_bits = any(entry.dtype.is_floating_point and entry.dtype.itemsize == 1 for entry in index.values())
    return floating({**index, **beside}) if in_8_bits else None


def floating(index: Mapping[str, TensorEntry]) -> torch.dtype:
    """The dtype of the first weights of floating point that are not in 8 bits; float32 where there are none."""
    dtypes = (entry.dtype for entry in index.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def kept_in_float32(network: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Patterns of the names of weights that a class keeps in float32 when it is loaded in this dtype."""
    if dtype == torch.float32:
        return ()
    kept = list(getattr(network, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16 or not hasattr(network, "base_model_prefix"):  # diffusers does for all dtypes
        kept += getattr(network, "_keep_in_fp32_modules", None) or []
    return tuple(pattern for name in kept for pattern in (f"{name}.*", f"*.{name}.*", f"*.{name}", name))


def in_dtypes(
    network: nn.Module, index: Mapping[str, TensorEntry], dtype: torch.dtype | None, keep: tuple[str, ...]
) -> nn.Module:
    """Give a network on meta the dtypes that it is loaded in."""
    made: dict[int, nn.Parameter] = {}
    for slot in slots(network):
        entry = index.get(slot.name)
        if slot.kind != "parameter" or not slot.tensor.is_meta or not slot.tensor.is_floating_point():
            continue
        in_file = slot.tensor.dtype if entry is None else entry.dtype
        chosen = torch.float32 if any(fnmatch(slot.name, pattern) for pattern in keep) else dtype or in_file
        if id(slot.tensor) not in made:
            empty = torch.empty_like(slot.tensor, dtype=chosen)
            made[id(slot.tensor)] = nn.Parameter(empty, requires_grad=False)
        slot.put(made[id(slot.tensor)])
    return network


def lying(part: Part) -> Mapping[str, InFile]:
    """How the weights of a component lie in its files."""
    assert part.index is not None
    return {name: InFile.at(entry.offset, entry.dtype) for name, entry in part.index.items()}
