"""The trace of a network for row streaming: which functions it calls on one picture, without weights or arithmetic.

A copy of the module on the meta device is called once, under a mode that sees every call of a PyTorch function. Tensors
on meta have shapes, so code that looks at shapes works; code that looks at values raises an error.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lowtide.activations.frame_cache import FrameCache, KeptRows
from lowtide.activations.graph import Made, RowAxis, Step, Value, Written, holds, is_map, rows_of
from lowtide.activations.rules import made_by
from lowtide.activations.steps import regrouped
from lowtide.activations.traced_call import Call, NotByRowsError
from lowtide.ops.attention import AttentionBackend
from lowtide.ops.meta_device import standing_for

RANDOM = frozenset(("normal", "uniform", "bernoulli", "multinomial"))
FACTORIES = frozenset(("arange", "zeros", "ones", "full", "linspace", "eye", "tensor", "scalar_tensor"))
"""Functions that make tables of numbers out of nothing: they are called again in a run."""


@dataclass(frozen=True, eq=False)
class Trace:
    """A network's input, its output, and all its values, each after the values that it is made of.

    `kept` are the frames kept for the next batch of frames, by their place in a `FrameCache` or in `after`: a tuple of
    what the network returned beside its output, or if that is empty its other arguments as it left them.
    """

    source: Value
    output: Value
    values: tuple[Value, ...]
    kept: dict[int, Value]
    after: Any = None


def check_no_autocast(module: nn.Module, device: torch.device) -> None:
    """Raise `NotByRowsError` under `torch.autocast`, which changes dtypes from one operator to the next."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        raise NotByRowsError(
            f"{type(module).__name__} cannot be computed row by row under torch.autocast, which gives each operator a "
            "dtype of its own. Leave torch.autocast out and load the model in the dtype to compute in, such as "
            "torch_dtype=torch.bfloat16, or decode whole: disable_vae_tiling()."
        )


@standing_for(None)
def trace(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, args: Any = (), kwargs: Any = None) -> Trace:
    """Trace `module(x, *args, **kwargs)` for a map x `[1, C, H, W]`, frames `[F, C, H, W]` or a clip `[1, C, F, H, W]`.

    Raises `NotByRowsError` for a network that cannot be computed row by row.
    """
    skeleton, slots = _on_meta(module)
    recorder = _Recorder(slots)
    x = torch.empty(shape, dtype=dtype, device="meta")
    source = recorder.record(x, Value(shape, dtype, rows_of(shape)))
    kept: dict[int, Value] = {}
    args, kwargs = beside = _stand_ins((tuple(args), kwargs or {}), recorder, kept)
    call = type(skeleton).forward.__get__(skeleton)  # the forward of the class, not the one that streams rows
    try:
        with torch.no_grad(), recorder:
            result = call(x, *args, **kwargs)
    except NotByRowsError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise NotByRowsError(f"it looks at values, or cannot take this input ({str(error).splitlines()[0]})") from error
    made, *others = result if _keeps(result, call) else (result,)
    output = recorder.map_of(made) if isinstance(made, torch.Tensor) else None
    if output is None or output.shape[0] != shape[0]:
        raise NotByRowsError(f"it returns a {type(result).__name__}, not one map made of its input, row by row")
    left = ((), beside) if not others else (tuple(others), None)  # what it returns is in place of what it was given
    after = tree_map_only(torch.Tensor, recorder.frames_of, left)
    frames = [leaf for leaf in tree_leaves(after) if isinstance(leaf, Value) and leaf.axis is not None]
    if len({*frames, source, output}) < len(frames) + 1 + (output is not source):
        raise NotByRowsError("it keeps its input or its output, or the same frames twice, for the next call")
    kept.update(enumerate(frames))
    _check_no_state(skeleton, recorder)
    return Trace(source, output, tuple(recorder.values), kept, after if frames or others else None)


def _check_no_state(skeleton: nn.Module, recorder: _Recorder) -> None:
    for part in skeleton.modules():
        for name, kept in {**vars(part), **part._buffers}.items():
            own = {"_parameters", "_buffers"}
            if name not in own and any(recorder.is_new(leaf) for leaf in tree_leaves(kept)):
                raise NotByRowsError(f"its {type(part).__name__} keeps a tensor in {name} for later calls")


def _keeps(result: Any, call: Callable[..., Any]) -> bool:
    """Whether a network returns, beside its output, frames for the next call: one that takes a cache."""
    return isinstance(result, tuple) and len(result) > 1 and any("cache" in name for name in signature(call).parameters)


def _stand_ins(arguments: Any, recorder: _Recorder, kept: dict[int, Value]) -> Any:
    """The arguments with tensors on meta for tensors and for frames kept before; lists and dictionaries are copies."""
    places, numbers = count(), count()

    def stand_in(leaf: Any) -> Any:
        if isinstance(leaf, FrameCache):
            return _TracedCache(leaf, recorder, kept)
        if not isinstance(leaf, (torch.Tensor, KeptRows)):
            return leaf
        shape = tuple(leaf.shape)
        on_meta = torch.empty(shape, dtype=leaf.dtype, device="meta")
        if isinstance(leaf, KeptRows):
            recorder.record(on_meta, Value(shape, leaf.dtype, rows_of(shape), place=next(places)))
        else:
            recorder.record(on_meta, Value(shape, leaf.dtype, given=next(numbers)))
        return on_meta

    return tree_map(stand_in, arguments)


def _on_meta(module: nn.Module) -> tuple[nn.Module, dict[int, tuple[torch.Tensor, str]]]:
    """A copy of a module with its weights on meta, and these weights by `id`, with their names."""
    memo: dict[int, Any] = {id(module.__dict__["forward"]): None} if "forward" in module.__dict__ else {}
    slots: dict[int, tuple[torch.Tensor, str]] = {}
    for prefix, owner in module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and id(tensor) not in memo:
                on_meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                copied = nn.Parameter(on_meta, requires_grad=False) if name in owner._parameters else on_meta
                memo[id(tensor)] = copied
                slots[id(copied)] = (copied, f"{prefix}.{name}" if prefix else name)
    skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
        if hasattr(part, "attention_backend"):
            part.__dict__["attention_backend"] = AttentionBackend()  # PyTorch's own, a single function in the trace
    return skeleton, slots


class _TracedCache(FrameCache):
    """Stands in for the cache of a run: frames kept before are values without a step, frames to keep are recorded."""

    def __init__(self, real: FrameCache, recorder: _Recorder, kept: dict[int, Value]) -> None:
        super().__init__()
        self.has_before, self.is_last = real.has_before, real.is_last
        self._recorder = recorder
        self._kept = kept

    def _before(self, place: int, x_BCFHW: torch.Tensor, frames: int) -> torch.Tensor:
        shape = (*x_BCFHW.shape[:2], frames, *x_BCFHW.shape[3:])
        before = torch.empty(shape, dtype=x_BCFHW.dtype, device="meta")
        self._recorder.record(before, Value(shape, x_BCFHW.dtype, rows_of(shape), place=place))
        return before

    def _keep(self, place: int, frames_BCFHW: torch.Tensor) -> None:
        value = self._recorder.value_of(frames_BCFHW)
        assert value is not None
        self._kept[place] = value


class _Recorder(TorchFunctionMode):
    """Records each function that is called on a recorded tensor, as the step that makes a new value."""

    def __init__(self, slots: dict[int, tuple[torch.Tensor, str]]) -> None:
        super().__init__()
        self.values: list[Value] = []
        self._known: set[Value] = set()
        self._recorded: dict[int, tuple[torch.Tensor, Value]] = {}  # keeps tensors alive, so no id is used twice
        self._ids_in_memory: defaultdict[int, set[int]] = defaultdict(set)
        for tensor, name in slots.values():
            self.record(tensor, Value(tuple(tensor.shape), tensor.dtype, slot=name))

    def record(self, tensor: torch.Tensor, value: Value) -> Value:
        """Remember which value a tensor is."""
        self._recorded[id(tensor)] = (tensor, value)
        self._ids_in_memory[tensor.untyped_storage()._cdata].add(id(tensor))
        self.values.append(value)
        self._known.add(value)
        return value

    def value_of(self, tensor: torch.Tensor) -> Value | None:
        """The value that a tensor is, if it was made of the input or of weights."""
        return self._recorded[id(tensor)][1] if id(tensor) in self._recorded else None

    def is_new(self, thing: object) -> bool:
        """Whether something is a tensor that the network made."""
        value = self.value_of(thing) if isinstance(thing, torch.Tensor) else None
        return value is not None and value.slot is None

    def map_of(self, tensor: torch.Tensor) -> Value | None:
        """The map or clip that a tensor is, with each row of the picture as a row, if it is one."""
        value = self.value_of(tensor)
        if value is None or value.axis is None or is_map(value):
            return value if value is not None and is_map(value) else None
        shape = value.shape
        if len(shape) not in (4, 5) or value.axis.dim != len(shape) - 2 or value.axis.planes > 1:
            return None
        value = regrouped(value, rows_of(shape))
        self._add(value)
        return value

    def frames_of(self, tensor: torch.Tensor) -> Value:
        """The value that a tensor is which the network keeps; raises `NotByRowsError` for what are no frames."""
        value = self.value_of(tensor)
        if value is not None and value.given is not None:
            return value
        frames = self.map_of(tensor)
        if frames is None:
            raise NotByRowsError(f"it keeps a tensor {list(tensor.shape)} for the next call that is no map or clip")
        return frames

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__setitem__" and self._writes_numbers(*args):
            return None
        if func.__name__ in ("__setitem__", "__set__", "set_") or kwargs.get("out") is not None:
            raise NotByRowsError(f"it writes into a tensor by {func.__name__}")
        if func.__name__ in FACTORIES:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        seen: list[Value] = []
        if not any(isinstance(output, torch.Tensor) for output in outputs) or func.__name__ == "__get__":
            return result
        if args and result is args[0] and not _is_in_place(func, kwargs):
            return result
        named = tree_map_only(torch.Tensor, lambda tensor: self._named(tensor, seen, func), (args, kwargs))
        if func.__name__.startswith("rand") or func.__name__.rstrip("_") in RANDOM:
            raise NotByRowsError(f"it draws random numbers by {func.__name__}, which would be others than at once")
        if not seen and func.__name__ not in FACTORIES:
            return result
        for place, output in enumerate(outputs):
            self._note(func, named, output, place if isinstance(result, (tuple, list)) else None)
        return result

    def _writes_numbers(self, table: torch.Tensor, index: Any, number: Any) -> bool:
        """Note a number that is written into a row of a table that the network made itself; False for anything else."""
        value = self.value_of(table)
        if value is None or not isinstance(value.step, Made) or not isinstance(number, (int, float)):
            return False
        is_row = isinstance(index, tuple) and len(index) == len(value.shape) == 2 and isinstance(index[0], int)
        if not is_row or not isinstance(index[1], slice) or self._is_shared(value, table):
            return False
        if not isinstance(value.step, Written):
            if value.step.name not in FACTORIES:
                return False
            value = replace(value, step=Written(value.step.func, value.step.arguments))
            self.record(table, value)
        assert isinstance(value.step, Written)
        first, end, stride = index[1].indices(value.shape[1])
        value.step.writes.append((index[0] % value.shape[0], first, end, float(number)))
        return stride == 1

    def _named(self, tensor: torch.Tensor, seen: list[Value], func: Callable[..., Any]) -> Any:
        value = self.value_of(tensor)
        if value is None:
            # Made of neither the input nor a weight: a table of numbers for the whole map, which fits no band.
            raise NotByRowsError(f"it makes a tensor {list(tensor.shape)} of its own for {func.__name__}")
        seen.append(value)
        return value

    def _note(self, func: Callable[..., Any], named: Any, output: torch.Tensor, pick: int | None) -> None:
        args, kwargs = named
        has_rows = any(value.axis is not None for value in holds(named))
        if _is_in_place(func, kwargs) and (self._is_shared(args[0], output) or not has_rows):
            reason = "it writes to a tensor that others see, or to a weight"
            raise NotByRowsError(f"{reason}, in {func.__name__} (is it in training? call eval() on it)")
        step: Step = Made(func, named, pick)
        axis: RowAxis | None = None
        if has_rows:
            step, axis = made_by(Call(func, args, kwargs, output, pick))
            self._add(*step.inputs, *step.parts)
        self.record(output, Value(tuple(output.shape), output.dtype, axis, step))

    def _add(self, *inputs: Value) -> None:
        """Remember the values with other rows that a rule made."""
        for value in inputs:
            if value not in self._known:
                self._add(*([] if value.step is None else value.step.inputs))
                self._known.add(value)
                self.values.append(value)

    def _is_shared(self, written: Value, tensor: torch.Tensor) -> bool:
        """Whether another recorded tensor lies in the same memory."""
        neighbours = (self._recorded[key] for key in self._ids_in_memory[tensor.untyped_storage()._cdata])
        return any(value is not written and other is not tensor for other, value in neighbours)


def _is_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = func.__name__
    return kwargs.get("inplace", False) or (name.endswith("_") and not name.startswith("__")) or name.startswith("__i")
