"""Put a casting on a module and take it off again, by the arguments or the names that users give."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from lowtide.casting.cast_module import cast, uncast
from lowtide.casting.cast_weight import FLOATING
from lowtide.casting.casting import INT4, NAMED_CASTINGS, NEVER_CAST, Casting
from lowtide.machine.heap import trim_heap
from lowtide.memory.attach import set_aside
from lowtide.ops.quantization import STORAGE
from lowtide.weights.fill import dtype_by_name, dtype_name
from lowtide.weights.slots import slots


def casting_rule(
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    skip_modules_pattern: str | Collection[str] | None = "auto",
    skip_modules_classes: Collection[type[nn.Module]] | None = None,
    *,
    scaled: bool = False,
    fp8_matmul: bool = False,
) -> Casting:
    """What these arguments of layerwise casting mean; see `lowtide.hooks.apply_layerwise_casting`.

    Raises `ValueError` for dtypes and patterns that are not possible.
    """
    if compute_dtype is not None and compute_dtype not in FLOATING:
        possible = ", ".join(map(str, FLOATING))
        raise ValueError(f"compute_dtype={compute_dtype} is not possible: layers compute in one of {possible}.")
    storages = (*STORAGE.values(), getattr(torch, INT4))
    if storage_dtype not in storages:
        possible = ", ".join(map(str, storages))
        raise ValueError(f"storage_dtype={storage_dtype} is not possible: weights are cast to one of {possible}.")
    patterns = NEVER_CAST if skip_modules_pattern == "auto" else skip_modules_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"skip_modules_pattern {pattern!r} is not a regular expression: {error}.") from error
    return Casting(
        dtype_name(storage_dtype),
        scaled=scaled,
        fp8_matmul=fp8_matmul,
        compute=None if compute_dtype is None else dtype_name(compute_dtype),
        skip_patterns=patterns,
        skip_classes=tuple(skip_modules_classes or ()),
    )


def named_casting(asked: Casting | str | None) -> Casting | None:
    """The casting called "fp8" (e4m3fn with scales), "int8" or "int4"; raises `ValueError` for other names."""
    if asked is None or isinstance(asked, Casting):
        return asked
    if asked not in NAMED_CASTINGS:
        raise ValueError(
            f"casting={asked!r} is not possible: it is one of {', '.join(NAMED_CASTINGS)}, a lowtide.Casting, or None."
        )
    return NAMED_CASTINGS[asked]


def apply_casting(module: nn.Module, casting: Casting, own_dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Let a module's weights rest in 8 bits, under whatever rule it is; see `Casting`.

    Where `casting` names a dtype to compute in, all that is not cast gets it too. `own_dtypes`, for a module under no
    rule, gives layers with a weight that matches a pattern (`fnmatch`) another one. Raises `ValueError` for weights
    that cannot be cast.
    """
    with set_aside(module) as is_ruled:
        cast(module, casting, at_rest=is_ruled, own_dtypes=own_dtypes)
    if own_dtypes:
        _set_dtypes(module, None if casting.compute is None else getattr(torch, casting.compute), own_dtypes)
    elif casting.compute is not None:
        module.to(getattr(torch, casting.compute))  # under its rule again: what rests must follow, not be written to
    trim_heap()


def _set_dtypes(module: nn.Module, dtype: torch.dtype | None, own_dtypes: Mapping[str, torch.dtype]) -> None:
    """Like `module.to(dtype)`, layer by layer; a layer with a dtype of its own goes to that directly."""
    names: dict[nn.Module, list[str]] = {}
    for slot in slots(module):
        names.setdefault(slot.owner, []).append(slot.name)
    for layer, paths in names.items():
        wanted = dtype_by_name(paths, own_dtypes, dtype)
        if wanted is not None:
            layer._apply(
                lambda tensor, to=wanted: tensor.to(to) if tensor.is_floating_point() else tensor, recurse=False
            )


def remove_casting(module: nn.Module) -> None:
    """Undo `apply_casting`: weights of a checkpoint are as its file has them, others keep what their 8 bits hold."""
    with set_aside(module) as is_ruled:
        uncast(module, at_rest=is_ruled)
