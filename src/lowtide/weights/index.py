"""Where each tensor of a safetensors checkpoint lies: file, byte range, dtype and shape, read without the data.

Format: 8 bytes, the header's length N (little endian); N bytes of JSON, `name -> {dtype, shape, data_offsets}`; data.
See https://github.com/huggingface/safetensors#format. A header is untrusted input, so every claim in it is checked.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowtide.configs import CheckpointError, read_bounded

MAX_HEADER_BYTES = 4_000_000
"""The largest header that is read, and index of shards; published ones of these models have up to 400,000 bytes."""
MOST_TENSORS = 20_000
MAX_DIMENSIONS = 64
PICKLED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}

_FILE_NAMES = (
    ("shard", r"(?P<base>[^.]+?)(\.(?P<variant>.+?))?-\d{5}-of-\d{5}\.safetensors"),
    ("shard", r"(?P<base>[^.]+?)-\d{5}-of-\d{5}\.(?P<variant>.+)\.safetensors"),
    ("single", r"(?P<base>[^.]+)(\.(?P<variant>.+))?\.safetensors"),
    ("index", r"(?P<base>[^.]+)\.safetensors\.index(\.(?P<variant>.+))?\.json"),
    ("index", r"(?P<base>[^.]+)\.safetensors\.(?P<variant>.+)\.index\.json"),
    ("index", r"(?P<base>[^.]+)\.(?P<variant>.+)\.safetensors\.index\.json"),
)


class UnsafeWeightsError(CheckpointError):
    """The only weights at hand are pickled, and unpickling a file can run code hidden in it."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place: `nbytes` bytes from `offset`, counted from the start of `file`."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CheckpointIndex(Mapping[str, TensorEntry]):
    """Every tensor of one checkpoint by name, over one file or several shards."""

    entries: Mapping[str, TensorEntry] = field(repr=False)
    files: tuple[Path, ...]
    metadata: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all the tensors, as they lie in the files."""
        return sum(entry.nbytes for entry in self.entries.values())

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True)
class WeightsName:
    """What a published file name says: `kind` is "single", "shard" or "index"; `variant` is None for the default."""

    base: str
    variant: str | None
    kind: str


def parse_weights_name(name: str) -> WeightsName | None:
    """Read a file name such as `model.fp16-00001-of-00002.safetensors`; None if it names no safetensors weights."""
    for kind, pattern in _FILE_NAMES:
        if match := re.fullmatch(pattern, name):
            return WeightsName(match["base"], match["variant"], kind)
    return None


def read_index(file: Path) -> CheckpointIndex:
    """Read the header of one safetensors file.

    Raises `FileNotFoundError` if there is no such file, `CheckpointError` if it is not a valid safetensors file.
    """
    file = file.absolute()  # the data is read later, perhaps from another working directory
    header, data_start, size = _read_header(file)
    if len(header) > MOST_TENSORS:
        raise CheckpointError(f"{file}: the header names {len(header)} tensors; at most {MOST_TENSORS} are allowed.")
    metadata = _checked_metadata(file, header.pop("__metadata__", {}))
    entries = {name: _checked_entry(file, name, claim, data_start) for name, claim in header.items()}
    _check_layout(file, entries, data_start, size)
    return CheckpointIndex(entries, (file,), metadata)


def find_weights(folder: Path, base_name: str, variant: str | None = None) -> CheckpointIndex:
    """Find and read the weights called `base_name` in `folder`: one file, or shards with their JSON index.

    Published names: `model.safetensors`, `model.fp16.safetensors`, `model-00001-of-00002.safetensors` with
    `model.safetensors.index.json`, `model.fp16-00001-of-00002.safetensors` with `model.safetensors.index.fp16.json`,
    and the two older spellings of the last pair. Raises `FileNotFoundError` if there are none (it lists the variants,
    or the other files), `UnsafeWeightsError` if there are only pickled ones, `CheckpointError` if they are damaged.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, so {base_name!r} weights cannot be looked for in it.")
    names = sorted(entry.name for entry in folder.iterdir())
    published = _published(names, base_name)
    singles, indexes, shards = (published.get((variant, kind), []) for kind in ("single", "index", "shard"))
    if singles and indexes:
        raise CheckpointError(
            f"{folder}: both {singles[0]} and {indexes[0]} are there, and they may differ. Remove one of them."
        )
    if singles:
        return read_index(folder / singles[0])
    if indexes:
        return _read_shards(folder, indexes[0], names)
    if shards:
        raise CheckpointError(
            f"{folder}: {len(shards)} shards such as {shards[0]} are there, but not their index "
            f"({base_name}.safetensors.index.json). A download or a save was cut short: repeat it."
        )
    raise _no_weights(folder, base_name, variant, names)


def variants_in(folder: Path, base_name: str) -> set[str | None]:
    """The variants of the weights called `base_name` that a folder holds; None stands for the plain files."""
    if not folder.is_dir():
        return set()
    return {variant for variant, _ in _published([entry.name for entry in folder.iterdir()], base_name)}


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON object, the offset of the data after it, and the file's size."""
    size = _regular_size(file)
    if size < 8:
        raise CheckpointError(f"{file}: a safetensors file has at least 8 bytes, and this one has {size}.")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: the header claims {length} bytes; the file has {size}, and {MAX_HEADER_BYTES} are allowed "
                "at most. It is truncated, or not a safetensors file."
            )
        content = stream.read(length)
    if not content.startswith(b"{"):
        raise CheckpointError(f"{file}: the header must begin with a brace. It is not a safetensors file.")
    return _parse_object(file, content), 8 + length, size


def _regular_size(file: Path) -> int:
    """Size of a regular file in bytes, without opening it: opening a FIFO would wait for ever."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: not a regular file.")
    return status.st_size


def _parse_object(file: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors too
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(parsed).__name__}.")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:200]!r} occurs twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")


def _checked_metadata(file: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map text to text.")
    return metadata


def _checked_entry(file: Path, name: str, claim: Any, data_start: int) -> TensorEntry:
    """Check what the header claims of one tensor, as far as that does not depend on the other tensors."""
    where = f"{file}: tensor {name[:200]!r}"
    if not isinstance(claim, dict) or not {"dtype", "shape", "data_offsets"} <= claim.keys():
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets.")
    dtype = _checked_dtype(where, claim["dtype"])
    offsets = claim["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(value) is int for value in offsets):
        raise CheckpointError(f"{where}: data_offsets must be two whole numbers.")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise CheckpointError(f"{where}: data_offsets must be 0 <= begin <= end.")
    shape = _checked_shape(where, claim["shape"])
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if end - begin != nbytes:
        raise CheckpointError(f"{where}: {dtype} of shape {list(shape)} takes {nbytes} bytes, not {end - begin}.")
    return TensorEntry(file, data_start + begin, nbytes, dtype, shape)


def _checked_dtype(where: str, name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        shown = repr(name[:40]) if isinstance(name, str) else f"a {type(name).__name__}"
        raise CheckpointError(f"{where}: dtype {shown} cannot be read; possible are {', '.join(DTYPES)}.")
    return DTYPES[name]


def _checked_shape(where: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{where}: shape must be a list of whole numbers, none negative.")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible.")
    extent = 1  # of the non-empty dimensions: strides are computed from it even where the tensor is empty
    for size in shape:
        extent *= max(size, 1)
        if extent >= 2**59:  # times 16 bytes, the largest item, still fits a signed 64-bit count
            raise CheckpointError(f"{where}: the shape's product is absurd.")
    return tuple(shape)


def _check_layout(file: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """The tensors must cover the data exactly once: no overlap, no hole, nothing after the last."""
    position, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            fault = "overlaps" if entry.offset < position else "leaves a hole after"
            raise CheckpointError(f"{file}: tensor {name[:200]!r} {fault} {before[:200]!r}.")
        position, before = entry.offset + entry.nbytes, name
    if position != size:
        fault = f"is truncated: {position - size} bytes are missing" if position > size else "has bytes of no tensor"
        raise CheckpointError(f"{file}: the data {fault} (tensors end at {position}, the file at {size}).")


def _published(names: list[str], base_name: str) -> dict[tuple[str | None, str], list[str]]:
    """File names of the weights called `base_name`, by (variant, kind)."""
    by_kind: dict[tuple[str | None, str], list[str]] = {}
    for name in names:
        parsed = parse_weights_name(name)
        if parsed is not None and parsed.base == base_name:
            by_kind.setdefault((parsed.variant, parsed.kind), []).append(name)
    return by_kind


def _read_shards(folder: Path, index_name: str, names: list[str]) -> CheckpointIndex:
    index_file = folder / index_name
    weight_map = _read_weight_map(index_file)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_shard_name(index_file, shard, names)
    indexes = {shard: read_index(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in indexes[shard]:
            raise CheckpointError(f"{index_file}: tensor {name!r} should be in {shard}, but is not.")
    for shard, index in indexes.items():
        if stray := next((name for name in index if weight_map.get(name) != shard), None):
            raise CheckpointError(
                f"{index_file}: {shard} holds tensor {stray!r}, which the index does not place there."
            )
    entries = {name: indexes[shard][name] for name, shard in weight_map.items()}
    metadata = {key: value for index in indexes.values() for key, value in index.metadata.items()}
    return CheckpointIndex(entries, tuple(folder / shard for shard in shards), metadata)


def _read_weight_map(index_file: Path) -> dict[str, str]:
    weight_map = _parse_object(index_file, read_bounded(index_file, MAX_HEADER_BYTES)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map must map tensor names to file names.")
    return weight_map


def _check_shard_name(index_file: Path, shard: str, names: list[str]) -> None:
    """Raise unless a shard has the name of a file in the index's own folder, so that no name can lead elsewhere.

    That file may be a link, as in the Hub's cache: the folder's owner put it there.
    """
    if "/" in shard or "\\" in shard or shard in (".", ".."):
        raise CheckpointError(f"{index_file}: shard {shard!r} is not a plain file name.")
    if not shard.endswith(".safetensors"):
        raise CheckpointError(f"{index_file}: shard {shard!r} is not a .safetensors file.")
    if shard not in names:
        raise CheckpointError(
            f"{index_file}: shard {shard!r} is missing. A download or a save was cut short: repeat it."
        )


def _no_weights(folder: Path, base_name: str, variant: str | None, names: list[str]) -> Exception:
    asked = f"{folder} has no {base_name!r} weights" + (f" of variant {variant!r}" if variant else "")
    variants = {published for published, kind in _published(names, base_name) if kind != "shard"}
    if variants:
        possible = [f"variant={published!r}" for published in sorted(variants, key=lambda published: published or "")]
        return FileNotFoundError(f"{asked} in safetensors form. There are: {', '.join(possible)}.")
    pickled = [name for name in names if name.endswith(PICKLED_SUFFIXES)]
    if pickled:
        return UnsafeWeightsError(
            f"{asked} in safetensors form, only pickled ones ({', '.join(pickled[:5])}). A pickle can run any code, so "
            "it is never opened. Convert it once: torch.load(path, weights_only=True), then "
            f"safetensors.torch.save_file(tensors, '{base_name}.safetensors')."
        )
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return FileNotFoundError(f"{asked}. In it: {listed or 'nothing'}.")
