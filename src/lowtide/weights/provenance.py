"""Where the numbers of a tensor came from: which bytes of which file hold them too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from lowtide.weights.files import InFile, Origin, WeightFile, _mappings, pieces
from lowtide.weights.page_map import is_untouched, let_go


class _Facts(NamedTuple):
    """What a tensor is, as far as can be told without reading it. Some writes change none of it."""

    address: int
    version: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, version: int | None) -> _Facts:
        return cls(tensor.data_ptr(), version, tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _Note(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    origin: Origin
    facts: _Facts


_notes: dict[int, _Note] = {}


def check_files(tensors: Iterable[torch.Tensor]) -> None:
    """Raise `CheckpointError` if a file that any of `tensors` is a view of was cut off or written to."""
    files: set[WeightFile] = set()
    for tensor in tensors:
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
            mapped = _mappings.holding(tensor.data_ptr())
            if mapped is not None:
                files.add(mapped[0].file)
    for file in files:
        file.check()


def remember_origin(tensor: torch.Tensor, origin: Origin, content: torch.Tensor | None = None) -> None:
    """Note that `tensor` holds the numbers at `origin`; forgotten with the tensor.

    `content` is what `tensor.data` is about to become, where that is how it gets them.
    """
    key = id(tensor)
    facts = _Facts.of(tensor if content is None else content, _version(tensor))
    _notes[key] = _Note(weakref.ref(tensor, lambda _: _notes.pop(key, None)), origin, facts)


def noted_origin(tensor: torch.Tensor) -> Origin | None:
    """Where in a file the numbers of a tensor come from, by what it is: the file's mapped memory, or noted and the same
    as then. Whether they were written to since in a way that leaves no mark, `holds` tells.
    """
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    nbytes = tensor.numel() * tensor.itemsize
    is_as_in_file = tensor.device.type == "cpu" and tensor.is_contiguous()
    mapped = _mappings.holding(tensor.data_ptr()) if is_as_in_file else None
    if mapped is not None and mapped[1] + nbytes <= mapped[0].file.size:
        return Origin(mapped[0].file, mapped[1], nbytes, tensor.dtype)
    note = _notes.get(id(tensor))
    if note is None or note.tensor() is not tensor:  # an interrupt in the end of another tensor may leave its note
        return None
    return note.origin if note.facts == _Facts.of(tensor, _version(tensor)) else None


def holds(tensor: torch.Tensor, origin: Origin) -> bool:
    """Whether a tensor holds what its file says, bit for bit: its pages are the file's, or its bytes equal."""
    nbytes = tensor.numel() * tensor.itemsize
    is_as_in_file = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == origin.dtype
    mapped = _mappings.holding(tensor.data_ptr()) if is_as_in_file else None
    is_mapped = mapped is not None and mapped[0].file is origin.file and mapped[1] == origin.offset
    return (is_mapped and is_untouched(tensor.data_ptr(), nbytes)) or _still_equal(tensor, origin)


def origin_of(tensor: torch.Tensor) -> Origin | None:
    """Where in a file the very numbers of a tensor are, or None if there is none or they were changed since."""
    origin = noted_origin(tensor)
    return origin if origin is not None and holds(tensor, origin) else None


def in_file(tensor: torch.Tensor) -> InFile | None:
    """How a tensor's numbers lie in the file they came from, if they did; their bytes are not looked at."""
    if tensor.device.type == "cpu" and tensor.numel() > 0 and _mappings.holding(tensor.data_ptr()) is not None:
        return InFile(tensor.dtype)
    origin = noted_origin(tensor)
    return None if origin is None else origin.lying


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def let_go_of_file(tensor: torch.Tensor) -> None:
    """Drop the mapped pages of a contiguous tensor, if it is a view of a file and nobody wrote to it; else nothing.

    Whoever else holds a view of these bytes sees the same: the pages come again from the file. Memory that is not of a
    file would be lost.
    """
    address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.itemsize
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or nbytes == 0:
        return
    mapped = _mappings.holding(address)
    if mapped is not None and mapped[1] + nbytes <= mapped[0].file.size and is_untouched(address, nbytes):
        let_go(address, nbytes)


def _still_equal(tensor: torch.Tensor, origin: Origin) -> bool:
    """Whether all numbers of a tensor are those at `origin`, and all of those."""
    if tensor.numel() != origin.nbytes // origin.dtype.itemsize:
        return False
    flat, done = tensor.detach().reshape(-1), 0
    for piece in pieces(origin):
        part = flat[done : done + piece.numel()].cpu()
        if not torch.equal(part.view(torch.uint8), piece.to(tensor.dtype).view(torch.uint8)):
            return False
        done += piece.numel()
    return True


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
            remember_origin(tensor, origin, content=made)  # the parameter stays, what it holds is changed
        return made

    return convert


def _is_copy_on_host(made: torch.Tensor, tensor: torch.Tensor) -> bool:
    is_on_host = type(tensor) is torch.nn.Parameter and tensor.device.type == made.device.type == "cpu"
    return is_on_host and made.data_ptr() != tensor.data_ptr()
