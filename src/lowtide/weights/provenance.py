"""Where the numbers of a tensor came from: which bytes of which file hold them too."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable

import torch

from lowtide.weights.files import _PAGE, InFile, Origin, WeightFile, _mappings, _pages, let_go, pieces

_SWAPPED, _PRESENT, _OF_A_FILE = 1 << 62, 1 << 63, 1 << 61  # Linux, Documentation/admin-guide/mm/pagemap.rst


_converted: dict[int, tuple[weakref.ref[torch.Tensor], Origin]] = {}


def check_files(tensors: Iterable[torch.Tensor]) -> None:
    """Raise `CheckpointError` if a file that any of `tensors` is a view of was cut off or written to."""
    files: set[WeightFile] = set()
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            found = _mappings.holding(tensor.data_ptr())
            if found is not None:
                files.add(found[0].file)
    for file in files:
        file.check()


def remember_origin(tensor: torch.Tensor, origin: Origin) -> None:
    """Note that `tensor` was converted from `origin`; forgotten with the tensor."""
    key = id(tensor)
    _converted[key] = (weakref.ref(tensor, lambda _: _converted.pop(key, None)), origin)


def hand_on_origin(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Note that `other` holds the numbers of `tensor`, in whatever form, if those were converted from a file."""
    if id(tensor) in _converted:
        remember_origin(other, _converted[id(tensor)][1])


def origin_of(tensor: torch.Tensor, known: torch.Tensor | None = None) -> Origin | None:
    """Where in a file the very numbers of a tensor are, or None if there is none or they were changed since.

    `known` is the tensor whose origin was noted, where that is another view of the same numbers.
    """
    if tensor.numel() == 0:
        return None
    nbytes = tensor.numel() * tensor.itemsize
    is_as_in_file = tensor.device.type == "cpu" and tensor.is_contiguous()
    found = _mappings.holding(tensor.data_ptr()) if is_as_in_file else None
    if found is not None and found[1] + nbytes <= found[0].file.size:
        origin = Origin(found[0].file, found[1], nbytes, tensor.dtype)
        return origin if _untouched(tensor.data_ptr(), nbytes) or _still_equal(tensor, origin) else None
    noted = id(tensor if known is None else known)
    if noted in _converted:
        origin = _converted[noted][1]
        return origin if _still_equal(tensor, origin) else None
    return None


def in_file(tensor: torch.Tensor) -> InFile | None:
    """How a tensor's numbers lie in the file they came from, if they did; whether they were changed since is not
    looked at.
    """
    if tensor.device.type == "cpu" and tensor.numel() > 0 and _mappings.holding(tensor.data_ptr()) is not None:
        return InFile(tensor.dtype)
    return _converted[id(tensor)][1].lying if id(tensor) in _converted else None


def let_go_of_file(tensor: torch.Tensor) -> None:
    """Drop the mapped pages of a contiguous tensor, if it is a view of a file and nobody wrote to it; else nothing.

    Whoever else holds a view of these bytes sees the same: the pages come again from the file. Memory that is not of a
    file would be lost.
    """
    address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.itemsize
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or nbytes == 0:
        return
    found = _mappings.holding(address)
    if found is not None and found[1] + nbytes <= found[0].file.size and _untouched(address, nbytes):
        let_go(address, nbytes)


def _still_equal(tensor: torch.Tensor, origin: Origin) -> bool:
    """Whether a tensor holds what its file says, bit for bit."""
    flat, done = tensor.detach().reshape(-1), 0
    for piece in pieces(origin):
        part = flat[done : done + piece.numel()].cpu()
        if not torch.equal(part.view(torch.uint8), piece.to(tensor.dtype).view(torch.uint8)):
            return False
        done += piece.numel()
    return True


def _untouched(address: int, nbytes: int) -> bool:
    """Whether no page of a range in a private mapping was written, as far as the system says."""
    start, length = _pages(address, nbytes)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            content = os.pread(pagemap.fileno(), length // _PAGE * 8, start // _PAGE * 8)
    except OSError:
        return False
    if len(content) != length // _PAGE * 8:
        return False
    written = (
        entry & _SWAPPED or (entry & _PRESENT and not entry & _OF_A_FILE) for entry in memoryview(content).cast("Q")
    )
    return not any(written)


def keeping_origins(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn`, as it is given to `Module._apply`, and for each weight of a file that it makes a copy of on the CPU:

    the pages of the file are dropped at once, so that no two copies are in memory; and the place in the file is
    remembered, so that the copy can rest there.
    """

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        made = fn(tensor)
        if not _is_copy_on_host(made, tensor):
            return made
        origin = origin_of(tensor)
        if origin is not None:
            let_go_of_file(tensor)
            remember_origin(tensor, origin)  # the parameter stays, what it holds is changed
        return made

    return convert


def _is_copy_on_host(made: torch.Tensor, tensor: torch.Tensor) -> bool:
    is_on_host = type(tensor) is torch.nn.Parameter and tensor.device.type == made.device.type == "cpu"
    return is_on_host and made.data_ptr() != tensor.data_ptr()
