"""On which device and in which dtype a run computes, from `--device` and `--dtype`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowtide.cli.errors import InputError, tell
from lowtide.cli.request import DType

if TYPE_CHECKING:
    import torch

    from lowtide.hub import Source
    from lowtide.planning.computing_dtype import Kind

_OF_FILES = "the dtype of the files"
DTYPE_HELP = "float32, bfloat16, float16; auto: the fastest here that is right for the model."


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. Raises `InputError` for one that is not here."""
    import torch

    from lowtide.machine.accelerators import best_device, is_here, obstacle

    device = best_device() if name == "auto" else torch.device(name)
    if not is_here(device):
        raise InputError(f"--device {name}: {obstacle(device)}. Use --device cpu; `lowtide doctor` tells more.")
    return device


def dtypes_to_try(name: DType, configs: Source, device: str) -> tuple[Kind, tuple[str, ...]]:
    """The dtypes in which a model of ours may compute on a kind of device, the best first, and what it computes.

    Its configurations are in `configs`. One that was asked for is alone; where it is slow here, that is told.
    """
    from lowtide.pipelines.own_dtype import own_dtypes, own_kind

    kind = own_kind(configs)
    if name is DType.AUTO:
        return kind, own_dtypes(configs, device)
    tell_if_slow(kind, name.value, device)
    return kind, (name.value,)


def tell_if_slow(kind: Kind, dtype: str, device: str) -> None:
    """Warn of a dtype that was asked for and is slow on this processor, with the measured factor."""
    from lowtide.planning.computing_dtype import slow_warning

    said = slow_warning(kind, dtype) if device == "cpu" else None
    if said is not None:
        tell(f"Warning: {said} Leave --dtype out for the fastest.")


def tell_chosen(kind: Kind, chosen: str | None, tried: Sequence[str | None], device: str) -> None:
    """Say in which of the dtypes that could be tried a run computes on a CPU, and why, where there was a choice.

    None is the files' own.
    """
    from lowtide.planning.computing_dtype import in_words, told_of

    if device != "cpu" or len(tried) < 2:
        return
    if chosen is not None:
        told_of(chosen)
    tell((chosen and in_words(kind, chosen)) or f"Computing in {chosen or _OF_FILES}.")
    if chosen != tried[0]:
        tell(f"In {tried[0] or _OF_FILES} it would be faster, and does not fit the budget.")


def tell_chosen_by_guest(
    kind: Kind, chosen: torch.dtype | None, tried: Sequence[torch.dtype | None], device: str
) -> None:
    """The same for dtypes of torch."""
    from lowtide.weights.fill import dtype_name

    names = [None if dtype is None else dtype_name(dtype) for dtype in (chosen, *tried)]
    tell_chosen(kind, names[0], names[1:], device)
