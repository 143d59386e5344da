"""How a tensor's numbers are ordered in memory."""

from __future__ import annotations

from collections.abc import Sequence


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of numbers in the order in which files hold them: the last dimension is the densest."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(1, shape[dim + 1])
    return tuple(strides)


def same_order(shape: Sequence[int], stride: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two strides mean the same order of numbers; those of dimensions of size 1 do not count."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, other, strict=True))


def is_reordered(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether numbers with these strides are ordered in another way than in a file."""
    return not same_order(shape, stride, contiguous_stride(shape))


def is_by_rows(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the entries of the first dimension follow one another without gaps, each a run of numbers."""
    row = 1
    for size in shape[1:]:
        row *= size
    inner = 1 + sum((size - 1) * step for size, step in zip(shape[1:], stride[1:], strict=True))
    return bool(shape) and inner == row and (shape[0] == 1 or stride[0] == row)
