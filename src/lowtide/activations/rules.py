"""Which functions of PyTorch can be computed row by row, and how: a table from a function's name to its rule.

A rule turns a call into a step and says where the rows of its result are, or raises `NotByRowsError`.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.activations.graph import (
    Attend,
    Convolution,
    Enlarge,
    GroupNorm,
    Linear,
    Local,
    Pad,
    Reshape,
    RowAxis,
    Step,
    Value,
    convolve,
    holds,
    is_map,
    rows_of,
)

StepAndRows = tuple[Step, RowAxis]
ROW_STRIDE = 1_000_003
"""The stride that marks the rows of a probe: a prime, so that no size times another stride is equal to it."""


class NotByRowsError(ValueError):
    """A network cannot be computed row by row; the message names what it does that prevents this."""


@dataclass(frozen=True)
class Call:
    """One call of a function: its arguments, values for tensors, and its result on meta (entry `pick` of a tuple)."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: torch.Tensor
    pick: int | None = None

    @property
    def name(self) -> str:
        """The function's name; the in-place form has the same name."""
        name = self.func.__name__
        return name.replace("__i", "__", 1) if name.startswith("__") else name.rstrip("_")

    @property
    def first(self) -> Value:
        """The first argument."""
        return self.args[0]

    @property
    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The arguments in the form in which a step keeps them."""
        return self.args, self.kwargs

    def named(self, *names: str) -> dict[str, Any]:
        """The arguments by the names in the function's signature, or by `names` for a function without one."""
        if names:
            return {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def made_by(call: Call) -> tuple[Step, RowAxis | None]:
    """The step that makes the result of a call, and where its rows are; None for a result made of weights alone."""
    if call.name not in RULES:
        raise NotByRowsError(f"it calls {call.name}, for which there is no rule")
    try:
        return RULES[call.name](call)
    except NotByRowsError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise NotByRowsError(f"it calls {call.name} with arguments that its rule does not cover") from error


def picking(func: Callable[..., Any], pick: int | None) -> Callable[..., Any]:
    """`func`, or entry `pick` of the tuple that it returns."""
    return func if pick is None else lambda *args, **kwargs: func(*args, **kwargs)[pick]


def _axis(value: Value) -> RowAxis:
    assert value.axis is not None
    return value.axis


# ---- elementwise functions and casts


def _elementwise(call: Call) -> StepAndRows:
    func = call.func if call.func.__name__ == call.name else getattr(torch.Tensor, call.name)
    kwargs = {key: value for key, value in call.kwargs.items() if key != "inplace"}
    step = Local(func, (call.args, kwargs), is_elementwise=True, in_place=_overwriting(call))
    forms = {(len(value.shape) - _axis(value).dim, _axis(value).count, _axis(value).width) for value in step.inputs}
    if len(forms) != 1:
        raise NotByRowsError(f"it combines tensors with different rows in {call.name}")
    ((from_right, count, width),) = forms
    for weight in step.weights():
        if len(weight.shape) >= from_right and weight.shape[-from_right] != 1:
            shape = list(weight.shape)
            raise NotByRowsError(f"it combines rows with a weight {shape} that differs from row to row in {call.name}")
    return step, RowAxis(call.result.ndim - from_right, count, width)


def _overwriting(call: Call) -> Callable[..., Any] | None:
    """The function's in-place form, if it has one and the result has the shape and dtype of the first argument."""
    first = call.args[0] if call.args else None
    same_form = isinstance(first, Value) and (first.shape, first.dtype) == (call.result.shape, call.result.dtype)
    if not same_form or first.axis is None:  # type: ignore[union-attr]
        return None
    if call.func in (F.silu, F.relu):
        return functools.partial(call.func, inplace=True)
    return getattr(torch.Tensor, f"{call.name.strip('_')}_", None)


def _cast(call: Call) -> tuple[Step, RowAxis | None]:
    source, dtype = call.first, call.result.dtype
    if dtype == source.dtype:
        return Local(_same, ((source,), {}), is_view=True), source.axis
    return Local(torch.Tensor.to, ((source, dtype), {})), source.axis


def _same(band: torch.Tensor) -> torch.Tensor:
    return band


def _dropout(call: Call) -> tuple[Step, RowAxis | None]:
    arguments = call.named("input", "p", "training")
    if arguments.get("training", True) and arguments.get("p", 0.5) > 0:
        raise NotByRowsError("it drops entries at random, as in training: call eval() on it")
    return _cast(call)


# ---- views and reshapes


def _view(call: Call) -> StepAndRows:
    """A function that selects and reorders dimensions: a probe with a stride for each shows where the rows end up."""
    source = call.first
    axis = _axis(source)
    if call.name == "squeeze" and len(call.args) < 2 and not call.kwargs:
        raise NotByRowsError("it calls squeeze without the dimensions that it drops: name them")
    strides = [2**place for place in range(len(source.shape))]
    strides[axis.dim] = ROW_STRIDE
    shape = list(source.shape)
    shape[axis.dim] += axis.width  # one row too many: shows a call that counts on their number
    probe = torch.empty_strided(shape, strides, dtype=source.dtype, device="meta")
    func = picking(call.func, call.pick)
    with torch.no_grad():
        view = func(probe, *call.args[1:], **call.kwargs)
    dims = [dim for dim in range(view.ndim) if view.stride(dim) == ROW_STRIDE]
    if len(dims) != 1 or view.shape[dims[0]] != shape[axis.dim] or view.ndim != call.result.ndim:
        raise NotByRowsError(f"it takes rows apart in {call.name}")
    return Local(func, call.arguments, is_view=True), RowAxis(dims[0], axis.count, axis.width)


def _reshape(call: Call) -> StepAndRows:
    source, shape = call.first, tuple(call.result.shape)
    axis = _axis(source)
    before, entries = math.prod(source.shape[: axis.dim]), 1
    candidates: list[RowAxis] = []
    for dim, size in enumerate(shape):
        if entries == before and size % axis.count == 0 and size >= axis.count:
            candidates.append(RowAxis(dim, axis.count, size // axis.count))
        entries *= size
    if not candidates:
        raise NotByRowsError(f"it mixes rows with other dimensions in {call.name}")
    as_map = RowAxis(2, axis.count)  # dimensions of size 1 leave a choice
    chosen = as_map if len(shape) == 4 and as_map in candidates else candidates[-1]
    return Reshape(source, shape, chosen), chosen


# ---- functions along other dimensions than the rows


def _linear(call: Call) -> StepAndRows:
    _check_last(call, 1)
    if len({value for value in holds(call.arguments) if value.axis is not None}) > 1:
        raise NotByRowsError("its linear has a weight that is made of the map")
    return Linear(call.func, call.arguments), _axis(call.first)


def _norm_of_last(call: Call) -> StepAndRows:
    _check_last(call, len(call.named("input", "normalized_shape")["normalized_shape"]))
    return Local(call.func, call.arguments), _axis(call.first)


def _check_last(call: Call, depth: int) -> None:
    if _axis(call.first).dim >= len(call.first.shape) - depth:
        raise NotByRowsError(f"its {call.name} goes along the rows")


def _along(call: Call) -> StepAndRows:
    step = Local(call.func, call.arguments)
    axis, ndim = _axis(step.inputs[0]), len(step.inputs[0].shape)
    dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else DIM_DEFAULTS.get(call.name))
    if call.name == "repeat_interleave":
        dims = call.kwargs.get("dim", call.args[2] if len(call.args) > 2 else None)
    if dims is None:
        raise NotByRowsError(f"its {call.name} goes over all entries")
    along = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    if axis.dim in along or any(value.axis != axis for value in step.inputs) or any(True for _ in step.weights()):
        raise NotByRowsError(f"its {call.name} goes along the rows")
    if call.result.ndim < ndim:
        axis = RowAxis(axis.dim - sum(dim < axis.dim for dim in along), axis.count, axis.width)
    return step, axis


# ---- functions with a step of their own


def _convolution(call: Call) -> StepAndRows:
    arguments = call.named("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    source, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    sides, groups = len(weight.shape) - 2, arguments.get("groups", 1)
    stride, dilation = _each(arguments.get("stride", 1), sides), _each(arguments.get("dilation", 1), sides)
    padding = _padding(arguments.get("padding", 0), dilation, weight.shape[2:])
    if not is_map(source) or weight.axis is not None:
        raise NotByRowsError("it convolves something other than one map with a weight")
    axis = rows_of(call.result.shape)
    if {*weight.shape[2:], *stride} == {1} and not any(padding):
        return Linear(_convolved_pixels, ((source, weight, bias, groups), {})), axis
    return Convolution(source, (weight, bias), stride, padding, dilation, groups), axis


def _padding(padding: Any, dilation: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    if padding != "same":
        return _each(0 if padding == "valid" else padding, len(kernel))
    around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(size % 2 for size in around):
        raise NotByRowsError("it pads unevenly in a convolution")
    return tuple(size // 2 for size in around)


def _convolved_pixels(band: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    if band.ndim == 5 and groups == 1:  # PyTorch has no kernel for this: it would copy every pixel
        return F.linear(band.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    sides = band.ndim - 2
    return convolve(band, weight, bias, (1,) * sides, (0,) * sides, (1,) * sides, groups)


def _each(number: Any, sides: int) -> tuple[int, ...]:
    """The numbers of all sides, from one number for all or from one for each."""
    return (number,) * sides if isinstance(number, int) else (*number, *[number[-1]] * sides)[:sides]


def _pad(call: Call) -> StepAndRows:
    arguments = call.named("input", "pad", "mode", "value")
    source, around, mode = arguments["input"], list(arguments["pad"]), arguments.get("mode", "constant")
    if not is_map(source) or mode != "constant" or len(around) > 4:
        raise NotByRowsError(f"its padding ({mode}, {around}) is not with a constant around a map")
    left, right, top, bottom = (*around, 0, 0, 0, 0)[:4]
    return Pad(source, (left, right, top, bottom), float(arguments.get("value") or 0)), rows_of(call.result.shape)


def _interpolate(call: Call) -> StepAndRows:
    arguments = call.named()
    source, mode = arguments["input"], arguments["mode"]
    sides = list(zip(call.result.shape[2:], source.shape[2:], strict=True))
    factors = [new // old for new, old in sides]
    scale = arguments["scale_factor"]
    if scale is not None and not arguments["recompute_scale_factor"]:
        scales = scale if isinstance(scale, (tuple, list)) else [scale] * len(sides)
        exact = [float(number) for number in scales] == factors
    else:
        exact = not any(new % old for new, old in sides)
    if not is_map(source) or mode not in ("nearest", "nearest-exact") or not exact:
        raise NotByRowsError(f"it resizes with interpolate({mode!r}), not by whole numbers to the nearest neighbour")
    return Enlarge(source, tuple(factors)), rows_of(call.result.shape)


def _group_norm(call: Call) -> StepAndRows:
    arguments = call.named("input", "num_groups", "weight", "bias", "eps")
    source = arguments["input"]
    if _axis(source).dim < 2 or source.shape[0] != 1:
        raise NotByRowsError("its group_norm does not have the channels before the rows")
    scale_and_shift = arguments.get("weight"), arguments.get("bias")
    return GroupNorm(source, arguments["num_groups"], scale_and_shift, arguments.get("eps", 1e-5)), _axis(source)


def _batch_norm(call: Call) -> StepAndRows:
    arguments = call.named()
    if arguments["training"] or arguments["running_mean"] is None:
        raise NotByRowsError("its batch_norm takes statistics of the batch, as in training: call eval() on it")
    return Local(F.batch_norm, call.arguments), _axis(arguments["input"])


def _attention(call: Call) -> StepAndRows:
    arguments = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    tokens = all(value.axis is not None and value.axis.dim == len(value.shape) - 2 for value in (q, k, v))
    if not tokens or any(arguments.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        raise NotByRowsError("its attention has dropout, is causal, has grouped heads, or is not over pixels as tokens")
    if (k.axis, k.shape[:-2]) != (v.axis, v.shape[:-2]):
        raise NotByRowsError("its attention has keys and values of different rows")
    if arguments.get("attn_mask") is not None:
        raise NotByRowsError("its attention has a mask")
    return Attend(q, k, v, arguments.get("scale")), _axis(q)


DIM_DEFAULTS = {"glu": -1, "cat": 0, "concat": 0, "concatenate": 0}
ELEMENTWISE = """
    add sub rsub mul div true_divide neg abs exp log sqrt rsqrt pow square reciprocal sin cos tanh sigmoid relu relu6
    silu gelu elu celu selu leaky_relu hardtanh hardswish hardsigmoid softplus softsign mish logsigmoid clamp clamp_min
    clamp_max clip maximum minimum nan_to_num __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
    __rtruediv__ __rdiv__ __pow__ __neg__
"""
RULES: dict[str, Callable[[Call], tuple[Step, RowAxis | None]]] = {
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys("to type float half bfloat16 double type_as contiguous clone detach".split(), _cast),  # noqa: SIM905
    **dict.fromkeys(("dropout", "dropout2d", "alpha_dropout", "feature_dropout"), _dropout),
    **dict.fromkeys(("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t"), _view),
    **dict.fromkeys(("squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "__getitem__"), _view),
    **dict.fromkeys(("narrow", "select"), _view),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_of_last),
    **dict.fromkeys(("mean", "sum", "repeat_interleave", "softmax", *DIM_DEFAULTS), _along),
    "linear": _linear,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "pad": _pad,
    "interpolate": _interpolate,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
}
