"""The weights of one network in a file with other names: found by the library's own conversion, which is followed."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide.guests.followed import Followed, NotFollowedError
from lowtide.guests.library import diffusers, muted
from lowtide.guests.published_names import NamesError, by_own_names
from lowtide.quiet import quiet
from lowtide.weights.fill import state_names
from lowtide.weights.index import CheckpointError, CheckpointIndex, TensorEntry
from lowtide.weights.slots import slots

Tensors = dict[str, torch.Tensor]
_CLIP_OR_T5 = (
    "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.",
)  # fmt: skip
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.")
"""What the names of text encoders begin with in files of whole pipelines."""
_WITHOUT_PROJECTION = "text_encoders.clip_l.transformer."
_NOT_WRITTEN = Path("(weights that are computed)")
_ALIGNMENT = 4096


class NotInFileError(ValueError):
    """A file does not hold a network's weights; the message says what is missing."""


@dataclass(frozen=True, eq=False)
class Converted:
    """A network's weights by its own names.

    Those of `index` whose names are in `computed` are in no file until they are `at_hand`; the others are where the
    file has them.
    """

    index: CheckpointIndex
    computed: Mapping[str, torch.Tensor]
    followed: Followed

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are computed."""
        return sum(-(-self.index[name].nbytes // _ALIGNMENT) * _ALIGNMENT for name in self.computed)

    @contextmanager
    def at_hand(self) -> Generator[CheckpointIndex]:
        """The index, all of its weights in files: those that are computed in a temporary one.

        That has a name while this lasts, and is there for as long as somebody has it open.
        """
        if not self.computed:
            yield self.index
            return
        with tempfile.TemporaryDirectory(prefix="lowtide-", ignore_cleanup_errors=True) as folder:
            yield self._written(Path(folder) / "computed")

    def _written(self, file: Path) -> CheckpointIndex:
        """The index, once all that is computed is in a file: computed one by one."""
        entries, files = dict(self.index), {}
        with file.open("wb") as stream:
            for name, tensor in self.computed.items():
                numbers = self.followed.numbers(tensor, files).contiguous()
                content: Any = numbers.reshape(-1).view(torch.uint8).numpy()
                stream.seek(-(-stream.tell() // _ALIGNMENT) * _ALIGNMENT)
                place = stream.tell()
                stream.write(memoryview(content))
                entries[name] = TensorEntry(file, place, stream.tell() - place, numbers.dtype, tuple(numbers.shape))
        return CheckpointIndex(entries, (*self.index.files, file), self.index.metadata)


def converted(network: nn.Module, index: CheckpointIndex, *, alone: bool) -> Converted:
    """The weights of a network on meta that a file holds under names of its own; nothing of them is read.

    It may hold those of this network `alone`, or of a whole pipeline. Raises `NotInFileError` where it holds none of
    them, `CheckpointError` where it holds some, or of other shapes, and `NamesError` for a conversion that cannot be
    followed.
    """
    followed = Followed()
    tensors = {name: followed.on_meta(entry) for name, entry in index.items()}
    refusal: CheckpointError | None = None
    for result in conversions(network, tensors, followed, alone=alone):
        try:
            found = _by_entries(network, result, index, followed)
        except CheckpointError as error:
            refusal = error
            continue
        if found is not None:
            return found
    raise refusal or NotInFileError(f"none of its weights is in {index.files[0]}")


def conversions(network: nn.Module, tensors: Tensors, followed: Followed, *, alone: bool) -> Iterator[Tensors]:
    """What a network's weights may be by its own names, each possibility after the other, on meta.

    Raises `CheckpointError` where a conversion does not find what it needs, and `NamesError` where it is not followed.
    """
    for convert in _possible(network, tensors, alone=alone):
        try:
            with followed, muted(), quiet(), torch.no_grad():
                result = convert(dict(tensors))
        except (NotFollowedError, RuntimeError) as error:
            raise NamesError(f"how they are converted could not be followed: {_said(error)}") from error
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"No {type(network).__name__} can be made of the weights in the file ({_said(error)}). Check that the "
                "configuration belongs to them, or give this component."
            ) from error
        yield result


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def lacking(network: nn.Module, names: Collection[str]) -> list[str]:
    """The parameters of a network that are not among these names; one of the names of a tied one is enough."""
    groups: dict[int, list[str]] = {}
    for slot in slots(network):
        if slot.kind == "parameter":
            groups.setdefault(id(slot.tensor), []).append(slot.name)
    return [group[0] for group in groups.values() if not any(name in names for name in group)]


def _by_entries(network: nn.Module, result: Tensors, index: CheckpointIndex, followed: Followed) -> Converted | None:
    """The weights of a network in a result of a conversion; None where it has none of them."""
    entries: dict[str, TensorEntry] = {}
    not_there: list[torch.Tensor] = []
    for name, tensor in result.items():
        entry = followed.entry(tensor)
        if entry is None:
            nbytes = tensor.numel() * tensor.itemsize
            place = len(not_there) * _ALIGNMENT  # which one it is, while its own name is not known
            entry = TensorEntry(_NOT_WRITTEN, place, nbytes, tensor.dtype, tuple(tensor.shape))
            not_there.append(tensor)
        entries[name] = entry
    own = by_own_names(network, CheckpointIndex(entries, index.files, index.metadata))
    missing = lacking(network, own)
    if not own:
        return None
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{index.files[0]}: {missing[0]} of its {type(network).__name__} is not there{more}. Check that the "
            "configuration belongs to it."
        )
    places = {name: entry.offset // _ALIGNMENT for name, entry in own.items() if entry.file == _NOT_WRITTEN}
    return Converted(own, {name: not_there[place] for name, place in places.items()}, followed)


def _possible(network: Any, tensors: Tensors, *, alone: bool) -> Iterator[Callable[[Tensors], Tensors]]:
    """The conversions that a file may need: none, that of diffusers' table, or of the part that is an encoder."""
    if hasattr(network, "base_model_prefix"):
        yield from _of_text_encoders(network, tensors)
        if alone:
            yield dict
    elif state_names(network) <= tensors.keys():
        yield dict
    else:
        library = diffusers(type(network).__name__)
        table = importlib.import_module("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
        row = next((row for name, row in table.items() if isinstance(network, getattr(library, name))), None)
        if row is not None:
            yield lambda tensors: row["checkpoint_mapping_fn"](checkpoint=tensors, config=dict(network.config))


def _of_text_encoders(network: Any, tensors: Tensors) -> Iterator[Callable[[Tensors], Tensors]]:
    utils = importlib.import_module("diffusers.loaders.single_file_utils")
    for prefix in _CLIP_OR_T5:
        if any(name.startswith(prefix) for name in tensors):
            yield partial(_without, prefix)
    for prefix in _OPEN_CLIP:
        if any(name.startswith(prefix) for name in tensors):
            yield partial(utils.convert_open_clip_checkpoint, network, prefix=prefix)


def _without(prefix: str, tensors: Tensors) -> Tensors:
    """The weights of one encoder. That of Stable Diffusion 3 is used without its projection."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    positions = own.get("text_model.embeddings.position_embedding.weight")
    if prefix == _WITHOUT_PROJECTION and positions is not None:
        dtype = positions.dtype if positions.itemsize > 1 else torch.float32
        own["text_projection.weight"] = torch.eye(positions.shape[-1], dtype=dtype)
    return own
