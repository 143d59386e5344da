"""The stream on an accelerator: a copy stream of its own, and events instead of waiting."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from lowtide.machine.accelerators import Accelerator
from lowtide.machine.pinned_memory import HostBuffer
from lowtide.memory.bounds import STAGE_BYTES
from lowtide.memory.stream import Stream
from lowtide.memory.unit import Load, Unit
from lowtide.ops.modes import outside_inference_mode


class DeviceStream(Stream):
    """Loads units by copies that run beside computing, on a device of the kind that `accelerator` is.

    A buffer is overwritten only after an event that was recorded when computing had used it last, and computing waits
    for the event of the copy: the host waits for neither, and how long computing waits is timed on the device. Pinned
    units are one copy each. Other bytes, those of files too, go through two pinned buffers in the reader's thread.
    """

    def __init__(
        self,
        device: torch.device,
        accelerator: Accelerator,
        *,
        prefetch: int = 1,
        prefetch_bytes: int | None = None,
        zero_copy: bool = True,
    ) -> None:
        super().__init__(device, prefetch=prefetch, prefetch_bytes=prefetch_bytes, zero_copy=zero_copy)
        self._accelerator = accelerator
        self._copier = accelerator.new_stream(device)
        self._stages: list[HostBuffer] = []
        self._last: Any = None
        self._owners: list[Any] = []
        """The streams whose memory its buffers are: the allocator gives it to them again without waiting."""
        weakref.finalize(self, _wait_for_copies, self._copier, self._owners).atexit = False

    def enter(self, unit: Unit) -> None:
        """A call that needs `unit` begins, on whichever stream; see `Stream.enter`."""
        if unit.load is not None:
            self._computing()
        super().enter(unit)

    def refuse_capture(self, units: Iterable[Unit]) -> None:
        """Raise `RuntimeError` if what this thread asks for is captured in a graph, and not all `units` stay.

        Loaded or not: the graph would be replayed over buffers in which others have come to lie, and without a word.
        """
        if self._accelerator.is_capturing(self.device):
            unit = next((unit for unit in units if not unit.stays), None)
            if unit is not None:
                raise RuntimeError(
                    f"{unit.name} comes when it is called, and its call is captured in a graph, which is replayed "
                    "without the engine. Keep all weights on the device for a capture: lowtide.memory.detach(module), "
                    "or a budget with room for them."
                )

    def keep(self, unit: Unit) -> None:
        """Keep a loaded unit for good. The host waits for the copy, since streams that compute later will not."""
        super().keep(unit)
        event = self._live[unit].event
        if event is not None:
            event.synchronize()

    def dismiss(self, units: list[Unit]) -> None:
        """Serve these units no more; their weights are dropped, and their memory on the host is pinned no more."""
        super().dismiss(units)
        for unit in units:
            if unit.host is not None:
                unit.host.unpin()
        if not self._sizes:
            while self._stages:
                self._stages[-1].unpin()
                self._stages.pop()

    def _begin(self, load: Load) -> None:
        if load.buffer is None:
            return
        load.buffer.free = self._ring.freed(load.unit, load.buffer)
        if load.buffer.free is None:  # new: what its memory was before is in use until now
            owner = self._computing()
            load.buffer.free = owner.record_event()
            if owner not in self._owners:
                self._owners.append(owner)
        host = load.unit.host
        if host is not None and host.is_pinned:
            with self._accelerator.on(self.device, self._copier):
                self._copier.wait_event(load.buffer.free)
                try:
                    load.buffer.flat[: host.flat.numel()].copy_(host.flat, non_blocking=True)
                finally:
                    load.event = host.used = self._copier.record_event()
        else:
            super()._begin(load)

    def _computing(self) -> Any:
        """The stream that computes now, which a user may have chosen: it waits for the one that did so before it."""
        now = self._accelerator.computing(self.device)
        if self._last is None:  # asked first: no stream of PyTorch's is unequal to None
            self._last = now
        elif now != self._last and not self._accelerator.is_capturing(self.device):
            now.wait_stream(self._last)
            self._last = now
        return now

    def _read(self, load: Load) -> None:
        assert load.buffer is not None
        with outside_inference_mode(), self._accelerator.on(self.device, self._copier):
            self._copier.wait_event(load.buffer.free)
            try:
                for weight, place in self._copies(load.unit):
                    for start in range(0, weight.nbytes, STAGE_BYTES):
                        count = min(STAGE_BYTES, weight.nbytes - start)
                        self._through_stage(weight.rest, load.buffer.flat[place + start : place + start + count], start)
            finally:  # also where reading fails midway: what was copied until then is waited for
                load.event = self._copier.record_event()

    def _through_stage(self, rest: Any, target: torch.Tensor, start: int) -> None:
        if len(self._stages) < 2:
            stage = HostBuffer(STAGE_BYTES, self.device, self._accelerator, is_stage=True)
        else:
            stage = self._stages.pop(0)
            stage.used.synchronize()
        part = stage.flat[: target.numel()]
        try:
            rest.copy_into(part, start)
            target.copy_(part, non_blocking=True)
        finally:
            stage.used = self._copier.record_event()
            self._stages.append(stage)

    def _wait(self, load: Load) -> None:
        super()._wait(load)
        if load.event is not None:
            self._computing().wait_event(load.event)

    def _timed_wait(self, load: Load) -> None:
        before = self._accelerator.timed_event(self.device)
        self._wait(load)
        after = self._accelerator.timed_event(self.device)
        self.ledger.waits(load.unit.name, self._total(load.unit), before, after)

    def _release(self, load: Load) -> None:
        current = self._computing()
        if load.event is not None:
            current.wait_event(load.event)  # also a copy that nobody waited for must end before the buffer is reused
        elif load.buffer is not None and (load.reading is None or not load.reading.is_called_off):
            current.wait_stream(self._copier)  # something may have come between a copy and its event
        if load.buffer is not None:
            left = current.record_event()
            self._ring.left(load.buffer, left)
            for owner in self._owners:
                if owner != current:
                    owner.wait_event(left)
        super()._release(load)

    def after_fork(self) -> None:
        """Wait for nobody. A forked child cannot use an accelerator: PyTorch says so when a call comes to it."""
        self._reader.begin_anew()
        self.ledger.forget_waits()
        self._owners.clear()
        for load in self._live.values():
            load.reading = None


def _wait_for_copies(copier: Any, owners: list[Any]) -> None:
    """After a stream that nobody has any more: copies may be under way to memory that is freed with it."""
    for owner in owners:
        owner.wait_stream(copier)
