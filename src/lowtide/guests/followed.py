"""Follow a library's conversion of weights on meta: which bytes of a file a result is, or how it is computed of them.

A conversion renames tensors, takes rows of them, and copies them, all of which are bytes of the file again. What it
computes of several, such as halves that change places, is computed alone when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lowtide.weights.files import WeightFile
from lowtide.weights.index import TensorEntry

_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.cat.default}


class NotFollowedError(ValueError):
    """A conversion does what cannot be followed: it asks for numbers, or writes into tensors."""


class _Made(NamedTuple):
    """How the bytes of a tensor came to be: the `place`-th result of an operator."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int
    tensor: torch.Tensor


class Followed(TorchDispatchMode):
    """A mode in which conversions are run: operators on tensors of `on_meta` are looked at, all others run as ever."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[int, TensorEntry] = {}
        self._made: dict[int, _Made] = {}
        self._alive: list[torch.Tensor] = []  # a storage's number is free again when it is gone

    def on_meta(self, entry: TensorEntry) -> torch.Tensor:
        """A tensor on meta that stands for what a file holds there."""
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self._entries[_storage(tensor)] = entry
        self._alive.append(tensor)
        return tensor

    def entry(self, tensor: torch.Tensor) -> TensorEntry | None:
        """Where in a file the very numbers of a tensor are, in their order; None for what is computed."""
        whole = self._entries.get(_storage(tensor)) if tensor.is_meta else None
        if whole is None or whole.dtype != tensor.dtype or not tensor.is_contiguous():
            return None
        size = tensor.itemsize
        place = whole.offset + int(tensor.storage_offset()) * size
        return TensorEntry(whole.file, place, tensor.numel() * size, tensor.dtype, tuple(tensor.shape))

    def numbers(self, tensor: torch.Tensor, files: dict[Any, WeightFile]) -> torch.Tensor:
        """What a tensor stands for, computed of mapped `files`, which are opened as they are needed."""
        if not tensor.is_meta:
            return tensor
        key = _storage(tensor)
        if key in self._entries:
            base = _mapped(self._entries[key], files)
        elif key in self._made:
            made = self._made[key]
            args, kwargs = tree_map(lambda value: self._if_tensor(value, files), (made.args, dict(made.kwargs)))
            results = made.func(*args, **kwargs)
            base = results[made.place] if isinstance(results, (list, tuple)) else results
            base = base.as_strided((made.tensor.untyped_storage().nbytes() // base.itemsize,), (1,), 0)
        else:
            raise NotFollowedError("it is of no file")
        return base.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _if_tensor(self, value: Any, files: dict[Any, WeightFile]) -> Any:
        return self.numbers(value, files) if isinstance(value, torch.Tensor) else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            raise NotFollowedError(f"{func} writes into a tensor")
        results = func(*args, **kwargs)
        for place, result in enumerate(results if isinstance(results, (list, tuple)) else [results]):
            if isinstance(result, torch.Tensor) and result.is_meta:
                self._note(_Made(func, args, kwargs, place, result))
        return results

    def _note(self, made: _Made) -> None:
        key = _storage(made.tensor)
        if key in self._entries or key in self._made:
            return  # a view of what is known
        self._alive.append(made.tensor)
        copied = _copied(made)
        entry = None if copied is None else self.entry(copied)
        if entry is not None and made.tensor.is_contiguous() and made.tensor.dtype == entry.dtype:
            self._entries[key] = entry
        else:
            self._made[key] = made


def _copied(made: _Made) -> torch.Tensor | None:
    """What an operator makes a copy of, number by number; None for what does something else."""
    if made.func not in _COPIES:
        return None
    source = made.args[0]
    if isinstance(source, (list, tuple)):
        return source[0] if len(source) == 1 else None
    return source


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _mapped(entry: TensorEntry, files: dict[Any, WeightFile]) -> torch.Tensor:
    """The numbers of an entry, flat: a view of the file."""
    if entry.file not in files:
        files[entry.file] = WeightFile(entry.file)
    count = entry.nbytes // entry.dtype.itemsize
    if count == 0:
        return torch.empty(0, dtype=entry.dtype)
    mapping = files[entry.file].mapping("conversion")
    return torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=entry.offset)
