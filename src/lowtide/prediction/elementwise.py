"""How results of elementwise operators and of padding are laid out by kernels; on meta PyTorch decides it otherwise.

Padding with what is inside a map keeps channels last on a CPU, and on meta it does not. For elementwise operators the
two differ where a dimension has size 1: such a dimension's stride says nothing of where numbers lie, but kernels
that come later look at it to see whether a map has its channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from lowtide.ops.meta_device import meant_device

COPIES = {"clone", "_to_copy"}
"""Operators that PyTorch counts as elementwise, but that keep the strides they are given."""
PADDING = {"reflection_pad2d", "reflection_pad3d", "replication_pad2d", "replication_pad3d"}
Strides = tuple[int, ...]
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    """The result on meta of an operator, with the strides that a kernel would give it."""
    if func.overloadpacket.__name__ in PADDING and meant_device() == "cpu":
        layout = suggest_memory_format(args[0])
        kept = result.is_contiguous(memory_format=layout)
        return result if kept else result.new_empty(result.shape).contiguous(memory_format=layout)
    is_pointwise = torch.Tag.pointwise in func.tags and func.overloadpacket.__name__ not in COPIES
    is_new = isinstance(result, torch.Tensor) and is_pointwise and _allocates(func)
    if not is_new or 1 not in result.shape or result.ndim < 3:
        return result
    operands = _operands(func, args, kwargs)
    strides = kernel_strides(result.shape, operands)
    return result if strides == result.stride() else result.new_empty_strided(result.shape, strides)


def kernel_strides(shape: Sequence[int], operands: Sequence[torch.Tensor | None]) -> Strides:
    """The strides of a new tensor for the result of these operands, of which None is a number.

    Source: PyTorch, ATen/TensorIterator.cpp, `compute_fast_setup_type` and `reorder_dimensions`.
    """
    tensors = [operand for operand in operands if operand is not None]
    if tensors and len(tensors) == len(operands) and all(tensor.shape == tuple(shape) for tensor in tensors):
        same = _same_for_all(tensors)
        if same is not None:
            return same
    return _strides_in_order(shape, _order(shape, [_broadcast(tensor, shape) for tensor in tensors]))


def _same_for_all(tensors: list[torch.Tensor]) -> Strides | None:
    """The strides where all operands lie alike without gaps; None else."""
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        return torch.empty(first.shape, device="meta").stride()
    last = _FORMATS.get(first.ndim)
    if last is not None and all(tensor.is_contiguous(memory_format=last) for tensor in tensors):
        return torch.empty(first.shape, device="meta").to(memory_format=last).stride()
    is_dense = torch.ops.aten.is_non_overlapping_and_dense.default(first)
    return first.stride() if is_dense and all(tensor.stride() == first.stride() for tensor in tensors) else None


def _order(shape: Sequence[int], strides: list[Strides]) -> list[int]:
    """The dimensions from the innermost to the outermost."""
    order = list(reversed(range(len(shape))))
    for place in range(1, len(order)):
        inner = place
        for outer in reversed(range(place)):
            sign = _compared(shape, strides, order[outer], order[inner])
            if sign > 0:
                order[outer], order[inner] = order[inner], order[outer]
                inner = outer
            elif sign < 0:
                break
    return order


def _compared(shape: Sequence[int], strides: list[Strides], first: int, second: int) -> int:
    """Above 0 where the first dimension is to be outside the second, below 0 inside, 0 where nothing tells."""
    for stride in strides:
        if stride[first] == 0 or stride[second] == 0:
            continue
        if stride[first] != stride[second]:
            return stride[first] - stride[second]
        if shape[first] > shape[second]:
            return 1
    return 0


def _broadcast(tensor: torch.Tensor, shape: Sequence[int]) -> Strides:
    return tensor.expand(tuple(shape)).stride()


def _strides_in_order(shape: Sequence[int], order: list[int]) -> Strides:
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim], step = step, step * shape[dim]
    return tuple(strides)


def _allocates(func: Any) -> bool:
    """Whether an operator makes its result, which is then not one of its arguments nor a view of one."""
    return all(returned.alias_info is None for returned in func._schema.returns)


def _operands(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor | None]:
    """The arguments that are tensors, or become one: a number in the place of one is None."""
    operands: list[torch.Tensor | None] = []
    kinds = ("Tensor", "number") if func._overloadname == "Scalar" else ("Tensor",)
    for index, argument in enumerate(func._schema.arguments):
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(given, torch.Tensor):
            operands.append(given)
        elif isinstance(given, (int, float)) and str(argument.type) in kinds:
            operands.append(None)
    return operands
