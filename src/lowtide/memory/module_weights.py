"""The weights of a module: which slots see the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.memory.placeholder import AtRest
from lowtide.memory.read_only import ReadOnly
from lowtide.memory.store import DeviceRest, HostRest
from lowtide.memory.weight import View, Weight, span
from lowtide.ops.modes import outside_inference_mode
from lowtide.weights.provenance import noted_origin
from lowtide.weights.slots import Slot, slots

PLAIN = (torch.Tensor, nn.Parameter, getattr(nn, "Buffer", nn.Parameter))


def gather(slots: Iterable[Slot]) -> list[Weight]:
    """The weights that lie in `slots`, in their order, tied and overlapping ones as one; on meta they have no rest yet.

    Raises `ValueError` for tensors that are more than strided numbers.
    """
    weights: list[Weight] = []
    by_old: dict[int, list[Slot]] = {}
    on_meta: dict[int, list[Slot]] = {}
    placed: list[tuple[str, int, int, Slot]] = []
    order: dict[str, int] = {}
    for slot in map(_with_ordinary, slots):
        order.setdefault(slot.name, len(order))
        tensor = slot.tensor
        if isinstance(tensor, AtRest):
            by_old.setdefault(id(tensor.weight), []).append(slot)
            continue
        _check_plain(slot)
        if tensor.is_meta:
            on_meta.setdefault(id(tensor), []).append(slot)
        elif tensor.numel() > 0:
            start = tensor.data_ptr()
            end = start + span(tensor.shape, tensor.stride()) * tensor.itemsize
            placed.append((str(tensor.device), start, end, slot))
    weights += [_taken_over(group) for group in by_old.values()]
    weights += [_unfilled(group) for group in on_meta.values()]
    weights += [_real(group) for group in _overlapping(placed)]
    return sorted(weights, key=lambda weight: min(order[view.slot.name] for view in weight.views))


def _with_ordinary(slot: Slot) -> Slot:
    """The slot; what another module's `state_dict` gave to be read is the same bytes as an ordinary parameter there."""
    if not isinstance(slot.tensor, ReadOnly):
        return slot
    plain = slot.tensor.plain
    ordinary = nn.Parameter(plain, slot.tensor.requires_grad) if slot.kind == "parameter" else plain
    slot.put(ordinary)
    return replace(slot, tensor=ordinary)


def refill(left: Iterable[Slot]) -> None:
    """Put ordinary tensors where placeholders were left, on the devices on which they were given."""
    for weight in gather(left):
        weight.restore(to_given=True)


def refill_left(root: nn.Module, keeper: str) -> None:
    """`refill` where an interrupted change of rules left placeholders: in modules without the entry `keeper`.

    Those of weights in 8 bits are no such: they are under no rule by themselves.
    """
    at_rest = [slot for slot in slots(root) if isinstance(slot.tensor, AtRest) and keeper not in slot.owner.__dict__]
    refill(slot for slot in at_rest if type(slot.tensor.weight) is Weight)  # type: ignore[attr-defined]


def _taken_over(group: list[Slot]) -> Weight:
    old: Any = group[0].tensor
    views = [replace(slot.tensor.view_, slot=slot) for slot in group]  # type: ignore[attr-defined]
    return old.weight.taken_over(views)


def _unfilled(group: list[Slot]) -> Weight:
    tensor = group[0].tensor
    nbytes = span(tensor.shape, tensor.stride()) * tensor.itemsize
    return Weight([_view(slot, 0, slot.tensor.requires_grad) for slot in group], nbytes, None, torch.device("cpu"))


def _real(group: list[tuple[int, int, Slot]]) -> Weight:
    start, end = min(span[0] for span in group), max(span[1] for span in group)
    lowest = next(slot.tensor for first, _, slot in group if first == start)
    views = [_view(slot, first - start, slot.tensor.requires_grad) for first, _, slot in group]
    with outside_inference_mode():
        storage = lowest.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=lowest.device)
        flat.set_(storage, lowest.storage_offset() * lowest.itemsize, (end - start,))  # type: ignore[call-overload]
    is_one = all(view.key[:4] == views[0].key[:4] for view in views)
    origin = noted_origin(lowest) if is_one else None
    rest = HostRest(flat, origin) if lowest.device.type == "cpu" else DeviceRest(flat, origin)
    return Weight(views, end - start, rest, lowest.device)


def _view(slot: Slot, offset: int, requires_grad: bool) -> View:
    tensor = slot.tensor
    return View(slot, offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, requires_grad)


def _overlapping(placed: list[tuple[str, int, int, Slot]]) -> list[list[tuple[int, int, Slot]]]:
    """Group ranges of bytes that touch the same bytes."""
    groups: list[list[tuple[int, int, Slot]]] = []
    reach, where = 0, ""
    for device, start, end, slot in sorted(placed, key=lambda span: span[:3]):
        if groups and device == where and start < reach:
            groups[-1].append((start, end, slot))
            reach = max(reach, end)
        else:
            groups.append([(start, end, slot)])
            reach, where = end, device
    return groups


def is_plain(slot: Slot) -> bool:
    """Whether a slot holds strided numbers and nothing more, or the placeholder of such."""
    tensor = slot.tensor
    is_known = isinstance(tensor, AtRest) or type(tensor) in PLAIN
    return is_known and tensor.layout == torch.strided and not tensor.is_quantized


def _check_plain(slot: Slot) -> None:
    tensor = slot.tensor
    if isinstance(slot.owner, torch.jit.ScriptModule):
        raise ValueError(f"{slot.name} is inside a traced or scripted module, whose weights are frozen into its code.")
    if not is_plain(slot):
        raise ValueError(
            f"{slot.name} is a {type(tensor).__name__}, which cannot be moved as bytes. Offload the module before it "
            "is quantized or distributed, and after a first call if it is lazy; or leave this part out."
        )
