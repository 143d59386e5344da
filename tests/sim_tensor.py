"""Tensors of the stand-in for an accelerator of `tests.sim_device`, and how PyTorch and the library come to have it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from tests.sim_device import GENERATORS, CopyStream, Device, Home, Sim

from lowtide.fitting import prepare, process
from lowtide.fitting.process import USUAL_BASE
from lowtide.machine import accelerators, device_names
from lowtide.memory import module_weights
from lowtide.memory.device_stream import DeviceStream
from lowtide.planning import machine_rates, plan
from lowtide.planning.machine_rates import assumed_rates

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""What gives the host numbers of the device."""
ACROSS = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default}
MISSING = {aten._fused_sdp_choice.default}
"""What not every kind of device has."""


class Here:
    """The kind of device that is here now."""

    sim: ClassVar[Sim] = Sim(early=True)


class SimTensor(torch.Tensor):
    """A tensor of a device of that kind: `inner`, on the CPU, and the allocation that is its `home`."""

    inner: torch.Tensor
    home: Home
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, home: Home | None = None) -> SimTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner, made.home = inner, home or Home(Here.sim.of(device), inner.untyped_storage().nbytes())
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"sim({self.inner})"

    def __deepcopy__(self, memo: Any) -> SimTensor:
        return SimTensor(self.inner.clone(), self.device)

    def detach(self) -> SimTensor:
        """With a version of its own, as a parameter made of an ordinary tensor has it."""
        return SimTensor(self.inner, self.device, self.home)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: SimTensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner, self.home = other.inner, other.home

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [x for x in flat_tensors((args, kwargs)) if isinstance(x, SimTensor)]
    one = Here.sim.of(given[0].device)
    check_devices(func, args, kwargs, given)
    if func in MISSING:
        raise NotImplementedError(f"The operator {func} is not there for the 'sim' device.")
    if func is aten.copy_.default:
        return copied(one, *args, **kwargs)
    if func.is_view:
        inner = func(*mapped(unwrapped, args), **mapped(unwrapped, kwargs))
        return mapped(lambda x: SimTensor(x, given[0].device, given[0].home), inner)
    if func in WAITING:
        one.counts.waits.append(func.overloadpacket.__name__)
    used(one, given, func)
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else given[0].device
    if target.type != "sim":
        one.counts.waits.append(f"to {target.type}")
    elif target != given[0].device:
        target = torch.device("sim", target.index or 0)
    asked = {**mapped(unwrapped, kwargs), **({"device": torch.device("cpu")} if "device" in kwargs else {})}
    if draws(func) and asked.get("generator") is None:
        asked["generator"] = GENERATORS[one.name.index]
    made = func(*mapped(unwrapped, args), **asked)
    by_inner = {id(x.inner): x for x in given}
    homes = {x.data_ptr(): x.home for x in given}

    def wrapped(x: Any) -> Any:
        if target.type != "sim":
            return x
        if id(x) in by_inner:
            return by_inner[id(x)]
        return SimTensor(x, target, homes.get(x.data_ptr()) if x.numel() else None)

    return mapped(wrapped, made)


@functools.cache
def draws(func: Any) -> bool:
    """Whether an operator takes a generator: without one it draws from the device's own."""
    return any(argument.name == "generator" for argument in func._schema.arguments)


def used(one: Device, given: list[SimTensor], func: Any) -> None:
    """Computing reads or writes these now."""
    Here.sim.launch()
    one.counts.launches += 1
    one.computing.clock += Here.sim.launch_seconds
    place = one.computing.record()
    for x in given:
        part = part_of(x.inner)
        if x.home.is_pending(part):
            one.counts.problems.append(f"{func} uses memory that a copy has yet to fill")
        x.home.uses[part] = place


def part_of(inner: torch.Tensor) -> range:
    """The bytes of its allocation that a tensor reaches."""
    last = sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True))
    start = inner.storage_offset() * inner.itemsize
    return range(start, start + (last + 1) * inner.itemsize if inner.numel() else start)


def copied(one: Device, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    inner, origin = unwrapped(target), unwrapped(source)
    stream = Here.sim.chosen(one)
    Here.sim.may_fail("copy")
    if not isinstance(target, SimTensor):
        one.counts.waits.append("to cpu")
        used(one, [source], aten.copy_)
        inner.copy_(origin)
        return target
    if not isinstance(stream, CopyStream) or not non_blocking:
        used(one, [x for x in (target, source) if isinstance(x, SimTensor)], aten.copy_)
        if not isinstance(source, SimTensor):
            one.counts.copies += 1
            if not non_blocking:
                one.counts.waits.append("from cpu")
        inner.copy_(origin)
        return target
    one.counts.copies += 1
    home, part = target.home, part_of(inner)
    last_use = home.last_use(part)
    if stream.seen < last_use:
        one.counts.problems.append(f"a copy waited for {stream.seen}, its memory was in use until {last_use}")

    def do() -> None:
        home.pending.remove(part)
        inner.copy_(origin)

    home.pending.append(part)
    stream.push(do, origin)
    return target


def check_devices(func: Any, args: Any, kwargs: Any, given: list[SimTensor]) -> None:
    if func in ACROSS:
        return
    for x in flat_tensors((args, kwargs)):
        is_elsewhere = x.device != given[0].device and (x.ndim > 0 or isinstance(x, SimTensor))
        if is_elsewhere and not (func in INDEXING and x.device.type == "cpu"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {x.device} too")


def mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Change the tensors in what an operator is given or gives."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(change, one) for one in value])
    return {name: mapped(change, one) for name, one in value.items()} if isinstance(value, dict) else value


def flat_tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(found.append, value)
    return found


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    return x.inner if isinstance(x, SimTensor) else x


# ---- to PyTorch and to the library


def _empty(made: torch.Tensor, device: Any) -> SimTensor:
    if made.numel():
        torch.as_strided(made, (made.untyped_storage().nbytes() // made.itemsize,), (1,), 0).view(torch.uint8).fill_(
            255
        )
    return SimTensor(made, torch.device("sim", torch.device(device).index or 0))


@torch.library.impl("aten::empty.memory_format", "privateuseone")
def _(size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> SimTensor:
    return _empty(torch.empty(size, dtype=dtype, memory_format=memory_format), device)


@torch.library.impl("aten::empty_strided", "privateuseone")
def _(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> SimTensor:
    return _empty(torch.empty_strided(size, stride, dtype=dtype), device)


def _made_at_once(func: Any) -> None:
    """PyTorch would make it empty and then resize it, which only the tensor on the CPU would hear of."""

    @torch.library.impl(f"aten::{func._schema.name[6:]}.{func._overloadname}".removesuffix(".default"), "privateuseone")
    def _(*args: Any, device: Any = None, **kwargs: Any) -> SimTensor:
        return SimTensor(func(*args, **kwargs, device="cpu"), torch.device("sim", torch.device(device).index or 0))


for packet in (aten.arange, aten.linspace, aten.eye, aten.randperm):
    for overload in packet.overloads():
        if "out" not in overload:
            _made_at_once(getattr(packet, overload))


@torch.library.impl("aten::_copy_from", "privateuseone")
def _(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    unwrapped(target).copy_(unwrapped(source))  # of `torch.tensor(..., device=)`
    return target


@contextmanager
def simulated(*, early: bool = False, pins: bool = True, unified: bool = False, streams: bool = True) -> Generator[Sim]:
    """Have such devices here; fails at the end where there were problems."""
    with pytest.MonkeyPatch.context() as patch:
        sim = Sim(early=early, pins=pins, unified=unified, streams=streams)
        patch.setattr(Here, "sim", sim)
        patch.setitem(accelerators._KINDS, "sim", sim)
        released = DeviceStream._release

        def release(self: DeviceStream, load: Any) -> None:
            released(self, load)
            if load.buffer is not None and not load.unit.stays:
                load.buffer.flat.inner.fill_(255)  # NaN in every floating-point dtype

        patch.setattr(DeviceStream, "_release", release)
        patch.setattr(module_weights, "PLAIN", {*module_weights.PLAIN, SimTensor})
        for module in (plan, machine_rates):
            patch.setattr(module, "KINDS", (*device_names.KINDS, "sim"))
        patch.setattr(
            prepare, "machine_rates", lambda *_: replace(assumed_rates("float32"), device="sim", unified=unified)
        )
        patch.setattr(process, "alone", lambda *_: (USUAL_BASE, 0))
        yield sim
        assert not sim.problems, sim.problems[:3]
