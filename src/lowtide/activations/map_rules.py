"""The rules of functions of maps and clips: convolution, padding, resizing, shuffled pixels, norms, attention, sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.activations.graph import Linear, Local, Made, RowAxis, Step, Value, is_map, rows_of
from lowtide.activations.masks import is_table
from lowtide.activations.steps import (
    Attend,
    Convolution,
    Enlarge,
    GroupNorm,
    Pad,
    PadFromInside,
    Total,
    convolve,
    regrouped,
)
from lowtide.activations.traced_call import Call, NotByRowsError, StepAndRows, rows_in, with_same_rows


def as_map(value: Value, does: str) -> Value:
    """The value with each row of the picture as a row; raises `NotByRowsError` for one that is no map or clip."""
    axis, ndim = value.axis, len(value.shape)
    if axis is None or ndim not in (4, 5) or axis.dim != ndim - 2 or axis.planes > 1:
        raise NotByRowsError(f"it {does} something other than one map")
    return value if is_map(value) else regrouped(value, rows_of(value.shape))


def _convolution(call: Call) -> StepAndRows:
    arguments = call.named("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    source, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    sides, groups = len(weight.shape) - 2, arguments.get("groups", 1)
    stride, dilation = _each(arguments.get("stride", 1), sides), _each(arguments.get("dilation", 1), sides)
    padding = _padding(arguments.get("padding", 0), dilation, weight.shape[2:])
    source = as_map(source, "convolves")
    if weight.axis is not None:
        raise NotByRowsError("it convolves a map with something other than a weight")
    axis = rows_of(call.result.shape)
    if {*weight.shape[2:], *stride} == {1} and not any(padding):
        return Linear(_convolved_pixels, ((source, weight, bias, groups), {})), axis
    return Convolution(source, (weight, bias), stride, padding, dilation, groups), axis


def _transposed(call: Call) -> StepAndRows:
    """A transposed convolution that makes new rows of each row alone: its kernel is as high as its stride."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    arguments = call.named(*names)
    source, weight = as_map(arguments["input"], "convolves"), arguments["weight"]
    sides = len(weight.shape) - 2
    stride = _each(arguments.get("stride", 1), sides)
    around = [_each(arguments.get(name, 0), sides)[-2] for name in ("padding", "output_padding")]
    if weight.axis is not None or weight.shape[-2] != stride[-2] or any(around):
        raise NotByRowsError(f"its {call.name} makes rows of several rows")
    step = Local(
        call.func, ((source, *call.args[1:]), {key: call.kwargs[key] for key in call.kwargs if key != "input"})
    )
    return step, RowAxis(len(source.shape) - 2, source.rows, stride[-2])


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
    axis, ndim = rows_in(source), len(source.shape)
    if mode == "constant" and axis.dim not in {ndim - 1 - side // 2 for side, size in enumerate(around) if size}:
        return Local(call.func, call.arguments), axis
    source, (left, right, top, bottom, front, back) = as_map(source, "pads"), (*around, *[0] * 6)[:6]
    sides = (left, right, top, bottom, front, back)
    if len(around) > 2 * (ndim - 2) or (
        mode != "constant" and (mode not in ("replicate", "reflect") or min(sides) < 0)
    ):
        raise NotByRowsError(f"its padding ({mode}, {around}) is not with a constant or with what is inside the map")
    if mode == "constant":
        return Pad(source, sides, float(arguments.get("value") or 0)), rows_of(call.result.shape)
    return PadFromInside(source, sides, mode), rows_of(call.result.shape)


def _interpolate(call: Call) -> StepAndRows:
    arguments = call.named()
    source, mode = as_map(arguments["input"], "resizes"), arguments["mode"]
    sides = list(zip(call.result.shape[2:], source.shape[2:], strict=True))
    factors = [new // old for new, old in sides]
    scale = arguments["scale_factor"]
    if scale is not None and not arguments["recompute_scale_factor"]:
        scales = scale if isinstance(scale, (tuple, list)) else [scale] * len(sides)
        exact = [float(number) for number in scales] == factors
    else:
        exact = not any(new % old for new, old in sides)
    if mode not in ("nearest", "nearest-exact") or not exact:
        raise NotByRowsError(f"it resizes with interpolate({mode!r}), not by whole numbers to the nearest neighbour")
    return Enlarge(source, tuple(factors)), rows_of(call.result.shape)


def _pixel_shuffle(call: Call) -> StepAndRows:
    arguments = call.named("input", "upscale_factor")
    source, factor = as_map(arguments["input"], "shuffles"), int(arguments["upscale_factor"])
    return Local(F.pixel_shuffle, ((source, factor), {})), RowAxis(2, source.rows, factor)


def _pixel_unshuffle(call: Call) -> StepAndRows:
    arguments = call.named("input", "downscale_factor")
    source, factor = as_map(arguments["input"], "shuffles"), int(arguments["downscale_factor"])
    axis = RowAxis(2, source.rows // factor, factor)
    return Local(F.pixel_unshuffle, ((regrouped(source, axis), factor), {})), RowAxis(2, axis.count)


def _group_norm(call: Call) -> StepAndRows:
    arguments = call.named("input", "num_groups", "weight", "bias", "eps")
    source = arguments["input"]
    if rows_in(source).dim < 2:
        raise NotByRowsError("its group_norm does not have the channels before the rows")
    scale_and_shift = arguments.get("weight"), arguments.get("bias")
    return GroupNorm(source, arguments["num_groups"], scale_and_shift, arguments.get("eps", 1e-5)), rows_in(source)


def _batch_norm(call: Call) -> StepAndRows:
    arguments = call.named()
    if arguments["training"] or arguments["running_mean"] is None:
        raise NotByRowsError("its batch_norm takes statistics of the batch, as in training: call eval() on it")
    return Local(F.batch_norm, call.arguments), rows_in(arguments["input"])


def _attention(call: Call) -> StepAndRows:
    arguments = call.named("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    q, k, v = arguments["query"], arguments["key"], arguments["value"]
    if all(value.axis is not None and value.axis.dim < len(value.shape) - 2 for value in (q, k, v)):
        return Local(call.func, with_same_rows(call)[0].arguments), rows_in(q)  # over frames, for each pixel alone
    tokens = all(value.axis is not None and value.axis.dim == len(value.shape) - 2 for value in (q, k, v))
    if not tokens or any(arguments.get(name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        raise NotByRowsError("its attention has dropout, is causal, has grouped heads, or is not over pixels as tokens")
    if (k.axis, k.shape[:-2]) != (v.axis, v.shape[:-2]):
        raise NotByRowsError("its attention has keys and values of different rows")
    mask = arguments.get("attn_mask")
    if mask is not None and not is_table(mask):
        raise NotByRowsError("its attention has a mask that is not made of numbers of the pixels")
    return Attend(q, k, v, arguments.get("scale"), mask), rows_in(q)


def _new(call: Call) -> tuple[Step, RowAxis | None]:
    """A table of numbers that takes only its dtype from a map."""
    numbers = 1.0 if call.name == "new_ones" else 0.0
    return Made(torch.full, ((tuple(call.result.shape), numbers), {"dtype": call.result.dtype})), None


def _matmul(call: Call) -> tuple[Step, RowAxis | None]:
    first, second = call.args[:2]
    sides = [None if value.axis is None else len(value.shape) - value.axis.dim for value in (first, second)]
    if sides == [1, 2] and rows_in(first).planes == rows_in(second).planes == 1:
        rows = min(first.rows, second.rows)
        axes = [RowAxis(rows_in(value).dim, rows, value.shape[rows_in(value).dim] // rows) for value in (first, second)]
        return Total(*(regrouped(value, axis) for value, axis in zip((first, second), axes, strict=True))), None
    if sides in ([None, 1], [2, None]):
        axis, ndim = rows_in(first if sides[1] is None else second), call.result.ndim
        return Local(call.func, call.arguments), RowAxis(ndim - (sides[1] or 2), axis.count, axis.width, axis.planes)
    raise NotByRowsError(f"it multiplies rows of pixels with one another in {call.name}")


RULES: dict[str, Callable[[Call], tuple[Step, RowAxis | None]]] = {
    **dict.fromkeys(("new_ones", "new_zeros"), _new),
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "pad": _pad,
    "interpolate": _interpolate,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), _matmul),
}
