"""Which functions of PyTorch can be computed row by row, and how: a table from a function's name to its rule.

A rule turns a call into a step and says where the rows of its result are, or raises `NotByRowsError`. Rules of
convolutions, norms, padding, attention and the like are in `map_rules.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.activations import map_rules
from lowtide.activations.graph import Linear, Local, Reshape, RowAxis, Step, Value, holds, is_map
from lowtide.activations.steps import regrouped
from lowtide.activations.traced_call import Call, NotByRowsError, StepAndRows, picking, rows_in, with_same_rows
from lowtide.ops.convolution import channels_last

ROW_STRIDE = 1_000_003
"""The stride that marks the rows of a probe: a prime, so that no size times another stride is equal to it."""


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


# ---- elementwise functions and casts


def _elementwise(call: Call) -> StepAndRows:
    func = call.func if call.func.__name__ == call.name else getattr(torch.Tensor, call.name)
    call, from_right = with_same_rows(call)
    kwargs = {key: value for key, value in call.kwargs.items() if key not in ("inplace", "device")}
    step = Local(func, (call.args, kwargs), is_elementwise=True, in_place=_overwriting(call))
    for weight in step.weights():
        if len(weight.shape) >= from_right and weight.shape[-from_right] != 1:
            raise NotByRowsError(
                f"it combines rows in {call.name} with a tensor {list(weight.shape)} of its own, or a weight, that "
                "differs from row to row"
            )
    return step, replace(rows_in(step.inputs[0]), dim=call.result.ndim - from_right)


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
    axis = rows_in(source)
    if call.name == "squeeze" and len(call.args) < 2 and not call.kwargs:
        raise NotByRowsError("it calls squeeze without the dimensions that it drops: name them")
    strides = [2**place for place in range(len(source.shape))]
    strides[axis.dim] = ROW_STRIDE
    shape = list(source.shape)
    shape[axis.dim] = axis.size(axis.count + 1)  # one row too many: shows a call that counts on their number
    probe = torch.empty_strided(shape, strides, dtype=source.dtype, device="meta")
    func = picking(call.func, call.pick)
    with torch.no_grad():
        view = func(probe, *call.args[1:], **call.kwargs)
    dims = [dim for dim in range(view.ndim) if view.stride(dim) == ROW_STRIDE]
    if len(dims) != 1 or view.shape[dims[0]] != shape[axis.dim] or view.ndim != call.result.ndim:
        raise NotByRowsError(f"it takes rows apart in {call.name}")
    return Local(func, call.arguments, is_view=True), replace(axis, dim=dims[0])


def _reshape(call: Call) -> StepAndRows:
    source, shape = call.first, tuple(call.result.shape)
    axis = rows_in(source)
    candidates = _places(source, axis, shape)
    if not candidates and axis.planes == 1:
        before, entries = math.prod(source.shape[: axis.dim]), axis.size(axis.count)
        counts = (size for dim, size in enumerate(shape) if size > 1 and math.prod(shape[:dim]) == before)
        count = next((size for size in counts if entries % size == 0), axis.count)
        source = regrouped(
            source, RowAxis(axis.dim, count, entries // count)
        )  # groups of rows, as of pixels unshuffled
        candidates = _places(source, rows_in(source), shape)
    if not candidates:
        raise NotByRowsError(f"it mixes rows with other dimensions in {call.name}")
    as_map = RowAxis(len(shape) - 2, rows_in(source).count)  # dimensions of size 1 leave a choice
    chosen = as_map if len(shape) in (4, 5) and as_map in candidates else candidates[-1]
    return Reshape(source, shape, chosen, copies=_copies(source, shape)), chosen


def _places(source: Value, axis: RowAxis, shape: tuple[int, ...]) -> list[RowAxis]:
    """Where the rows of a value may be in another shape; in planes only if there is no other place."""
    before, entries = math.prod(source.shape[: axis.dim]) * axis.planes, 1
    places: list[RowAxis] = []
    for dim, size in enumerate(shape):
        planes, rest = divmod(before, entries) if entries else (0, 1)
        if rest == 0 and size > 0 and size % (planes * axis.count) == 0:
            places.append(RowAxis(dim, axis.count, size // (planes * axis.count), planes))
        entries *= size
    return [place for place in places if place.planes == 1] or places


def _copies(source: Value, shape: tuple[int, ...]) -> bool:
    """Whether entries in the order in which a band has them must be copied for another shape."""
    laid_out = _laid_out(source)
    return laid_out.reshape(shape).untyped_storage()._cdata != laid_out.untyped_storage()._cdata


def _laid_out(value: Value) -> torch.Tensor:
    """A tensor on meta in the layout of a band: maps and clips have their channels last."""
    if value.step is not None and value.step.is_view:
        return value.step.run([_laid_out(value.step.inputs[0])], (0, value.rows), lambda _: None)
    whole = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return whole.contiguous(memory_format=channels_last(whole)) if is_map(value) else whole


# ---- functions along other dimensions than the rows


def _linear(call: Call) -> StepAndRows:
    _check_last(call, 1)
    if len({value for value in holds(call.arguments) if value.axis is not None}) > 1:
        raise NotByRowsError("its linear has a weight that is made of the map")
    return Linear(call.func, call.arguments), rows_in(call.first)


def _norm_of_last(call: Call) -> StepAndRows:
    _check_last(call, len(call.named("input", "normalized_shape")["normalized_shape"]))
    return Local(call.func, call.arguments), rows_in(call.first)


def _check_last(call: Call, depth: int) -> None:
    if rows_in(call.first).dim >= len(call.first.shape) - depth:
        raise NotByRowsError(f"its {call.name} goes along the rows")


def _along(call: Call) -> StepAndRows:
    call, _ = with_same_rows(call)
    step = Local(call.func, call.arguments)
    axis, ndim = rows_in(step.inputs[0]), len(step.inputs[0].shape)
    dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else DIM_DEFAULTS.get(call.name))
    if dims is None:
        raise NotByRowsError(f"its {call.name} goes over all entries")
    along = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    same = all(value.axis == axis and len(value.shape) == ndim for value in step.inputs)
    if axis.dim in along or not same or any(True for _ in step.weights()):
        raise NotByRowsError(f"its {call.name} goes along the rows")
    if call.result.ndim < ndim:
        axis = replace(axis, dim=axis.dim - sum(dim < axis.dim for dim in along))
    return step, axis


def _repeat_interleave(call: Call) -> StepAndRows:
    source, axis = call.first, rows_in(call.first)
    dim = call.named("input", "repeats", "dim").get("dim")
    if dim is None or axis.planes > 1 or any(value is not source for value in holds(call.arguments)):
        raise NotByRowsError("its repeat_interleave goes over all entries, or as often as a tensor says")
    if dim % len(source.shape) == axis.dim:
        kwargs = {name: part for name, part in call.kwargs.items() if name != "output_size"}
        axis = replace(axis, width=call.result.shape[axis.dim] // axis.count)
        return Local(call.func, (call.args, kwargs)), axis
    return Local(call.func, call.arguments), axis


def _stack(call: Call) -> StepAndRows:
    call, _ = with_same_rows(call)
    step = Local(call.func, call.arguments)
    axis, dim = rows_in(step.inputs[0]), call.named("tensors", "dim").get("dim", 0) % call.result.ndim
    if any(True for _ in step.weights()):
        raise NotByRowsError("its stack puts rows beside a weight")
    return step, replace(axis, dim=axis.dim + (dim <= axis.dim))


def _repeat(call: Call) -> StepAndRows:
    source, axis = call.first, rows_in(call.first)
    added = call.result.ndim - len(source.shape)
    if call.result.shape[added + axis.dim] != source.shape[axis.dim]:
        raise NotByRowsError("its repeat goes along the rows")
    return Local(call.func, call.arguments), replace(axis, dim=added + axis.dim)


def _normalize(call: Call) -> StepAndRows:
    source, axis = call.first, rows_in(call.first)
    if call.named("input", "p", "dim", "eps").get("dim", 1) % len(source.shape) == axis.dim:
        raise NotByRowsError("its normalize goes along the rows")
    return Local(call.func, call.arguments), axis


DIM_DEFAULTS = {"glu": -1, "cat": 0, "concat": 0, "concatenate": 0}
ELEMENTWISE = """
    add sub rsub mul div true_divide neg abs exp log sqrt rsqrt pow square reciprocal sin cos tanh sigmoid relu relu6
    silu gelu elu celu selu leaky_relu hardtanh hardswish hardsigmoid softplus softsign mish logsigmoid clamp clamp_min
    clamp_max clip maximum minimum nan_to_num __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
    __rtruediv__ __rdiv__ __pow__ __neg__ zeros_like ones_like
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
    **dict.fromkeys(("mean", "sum", "softmax", *DIM_DEFAULTS), _along),
    "linear": _linear,
    "repeat_interleave": _repeat_interleave,
    "stack": _stack,
    "repeat": _repeat,
    "normalize": _normalize,
    **map_rules.RULES,
}
