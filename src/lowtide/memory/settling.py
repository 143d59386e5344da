"""Move every weight of a module to the resting place that a rule gives it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lowtide.machine.accelerators import Accelerator, accelerator
from lowtide.machine.pinned_memory import HostBuffer
from lowtide.memory.bounds import aligned, spread
from lowtide.memory.rule import Rule, Tier
from lowtide.memory.store import DiskRest, HostRest, Rest, Spill
from lowtide.memory.unit import Unit
from lowtide.memory.weight import Weight
from lowtide.weights.files import Origin, WeightFile
from lowtide.weights.index import CheckpointError, CheckpointIndex
from lowtide.weights.layout import is_by_rows
from lowtide.weights.provenance import holds


def settle_rests(units: list[Unit], rule: Rule, device: torch.device, index: CheckpointIndex | None) -> None:
    """Choose the units that stay on the device, move every weight to where it rests, and lay the placeholders.

    Goes unit by unit, so that the old copy of a unit is gone before the next is made. Raises `ValueError` for weights
    on meta that `index` does not have, and what reading and writing files raises.
    """
    source = _Source(index)
    for unit in units:
        for weight in unit.weights:
            if weight.rest is None:
                weight.rest = source.rest(weight)
    for unit in staying(units, rule):
        unit.stays = True
    mover = _Mover(rule, device)
    for unit in units:
        mover.move(unit)


def staying(units: list[Unit], rule: Rule) -> list[Unit]:
    """The units that stay on the device; warns of names that none of them has."""
    if rule.resident_units is None:
        return evenly(units, rule.resident_bytes)
    names = set(rule.resident_units)
    absent = names - {unit.name for unit in units}
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(names)} units that were to stay on the device are not there, such as "
            f"{min(absent)!r}: less stays. Plan anew for the network as it is now.",
            stacklevel=4,
        )
    return [unit for unit in units if unit.name in names]


def evenly(units: list[Unit], budget: int) -> list[Unit]:
    """Units of together at most `budget` bytes, spread over the list: copies then hide behind computing in between."""
    return [units[place] for place in spread([_size(unit) for unit in units], budget)]


def _size(unit: Unit) -> int:
    return sum(aligned(weight.nbytes) for weight in unit.weights)


class _Mover:
    """Moves weights, and counts what is used of the host's memory."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self.rule = rule
        self.device = device
        self.accelerator = accelerator(device)
        self.spill = Spill(rule.spill_folder)
        self.host_used = 0

    def move(self, unit: Unit) -> None:
        tier = self._tier(unit)
        if tier is Tier.HOST and self.accelerator is not None and not unit.stays:
            self._flatten(unit, self.accelerator)
        for weight in unit.weights:
            if unit.host is None:
                weight.rest = self._rest(weight, tier, stays=unit.stays)
            weight.forget_given()
            weight.lay_down()

    def _tier(self, unit: Unit) -> Tier:
        if self.rule.rest is not Tier.HOST or (unit.stays and self.device.type != "cpu"):
            return Tier.DISK
        nbytes = _size(unit)
        if self.rule.host_bytes is not None and self.host_used + nbytes > self.rule.host_bytes:
            return Tier.DISK
        self.host_used += nbytes
        return Tier.HOST

    def _rest(self, weight: Weight, tier: Tier, *, stays: bool) -> Rest:
        if tier is Tier.HOST:
            return HostRest(weight.rest.on_host(), weight.origin)
        in_file = on_disk(weight)
        if in_file is not None:
            return in_file
        may_spill = self.rule.spill or self.rule.host_bytes is not None
        return self.spill.write(weight.rest.on_host()) if may_spill and not stays else HostRest(weight.rest.on_host())

    def _flatten(self, unit: Unit, accelerator: Accelerator) -> None:
        """One run of host memory for the whole unit, so that it is one copy to the device."""
        sizes = [aligned(weight.nbytes) for weight in unit.weights]
        unit.host = HostBuffer(sum(sizes), self.device, accelerator, may_pin=self.rule.pin)
        place = 0
        for weight, size in zip(unit.weights, sizes, strict=True):
            part = unit.host.flat[place : place + weight.nbytes]
            (on_disk(weight) or weight.rest).copy_into(part)  # a file is read, not mapped: its pages would stay too
            weight.rest = HostRest(part, weight.origin)
            place += size


def on_disk(weight: Weight) -> DiskRest | None:
    """The file in which a weight is already, if it is in one unchanged."""
    if isinstance(weight.rest, DiskRest):
        return weight.rest
    first, origin = weight.views[0], weight.origin
    if origin is None or not is_by_rows(first.shape, first.stride):
        return None
    is_there = holds(first.of(weight.rest.flat).detach(), origin)
    return DiskRest(origin, first.dtype, (first.shape, first.stride)) if is_there else None


class _Source:
    """Where weights on meta come from."""

    def __init__(self, index: CheckpointIndex | None) -> None:
        self._index = index
        self._files: dict[Path, WeightFile] = {}

    def rest(self, weight: Weight) -> DiskRest:
        """The weight's place in the checkpoint; raises `ValueError` if it has none there."""
        names = [view.slot.name for view in weight.views]
        name = next((candidate for candidate in names if self._index is not None and candidate in self._index), None)
        if self._index is None or name is None:
            raise ValueError(
                f"{names[0]} is on meta, so its values must come from a checkpoint: pass its index, as in "
                "weights=lowtide.weights.index.find_weights(folder, name)."
            )
        entry, view = self._index[name], weight.views[names.index(name)]
        if entry.shape != view.shape:
            raise ValueError(f"{name}: {list(view.shape)} in the module, {list(entry.shape)} in the checkpoint.")
        if entry.file not in self._files:
            self._files[entry.file] = WeightFile(entry.file)
        if entry.offset + entry.nbytes > self._files[entry.file].size:
            raise CheckpointError(f"{entry.file}: the file has become shorter since its header was read.")
        return DiskRest(
            Origin(self._files[entry.file], entry.offset, entry.nbytes, entry.dtype),
            view.dtype,
            (view.shape, view.stride),
        )
