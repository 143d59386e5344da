"""Where each tensor of a GGUF file lies: byte range, kind of numbers and shape, read without the data.

Format: "GGUF"; version, number of tensors, number of settings; settings (name, type, value); tensors (name, dimensions,
kind, offset); data. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A header is untrusted input, so
every claim in it is checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowtide.ops.block_layout import LAYOUTS
from lowtide.weights.index import MAX_DIMENSIONS, MOST_TENSORS, CheckpointError, CheckpointIndex, TensorEntry

MAX_HEADER_BYTES = 16_000_000
"""The largest header that is read; those of diffusion models have some 100,000 bytes."""
MOST_NESTED = 4
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


class Kind(NamedTuple):
    """A kind of numbers: so many of them are packed together into so many bytes."""

    name: str
    numbers: int
    nbytes: int


KINDS = {
    0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22), 7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34), 20: Kind("IQ4_NL", 32, 18),
    10: Kind("Q2_K", 256, 84), 11: Kind("Q3_K", 256, 110), 12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176),
    14: Kind("Q6_K", 256, 210), 23: Kind("IQ4_XS", 256, 136),
}  # fmt: skip
"""The kinds that diffusers computes with, by their number in files."""
_PLAIN = {0: torch.float32, 1: torch.float16}
_BFLOAT16 = 30


@dataclass(frozen=True, eq=False)
class GgufIndex(CheckpointIndex):
    """Every tensor of a GGUF file by name. `kinds` has the numbers of those that are packed.

    Entries of these are bytes: uint8, each row as long as its packed bytes.
    """

    kinds: Mapping[str, int]


def read_gguf_index(file: Path) -> GgufIndex:
    """Read the header of a GGUF file.

    Raises `FileNotFoundError` if there is no such file, `CheckpointError` if it is not valid or of unknown kinds.
    """
    file = file.absolute()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file.")
    with file.open("rb") as stream:
        header = _Header(file, stream)
        counts = header.begin()
        alignment = header.settings(counts[1])
        claims = list(header.tensors(counts[0]))
    start = -(-header.place // alignment) * alignment
    entries = {claim.name: _checked(file, claim, start) for claim in claims}
    if len(entries) < len(claims):
        raise CheckpointError(f"{file}: a name of a tensor occurs twice.")
    kinds = {claim.name: claim.kind for claim in claims if claim.kind not in _PLAIN}
    return GgufIndex(entries, (file,), {}, kinds)


def resting_index(index: GgufIndex) -> CheckpointIndex:
    """The same tensors as a checkpoint of ours has them, for `lowtide.models.put_weights`: nothing is read.

    Q4_0 and Q8_0 stay in blocks, uint8 `[rows, blocks of a row, bytes of a block]`; F32, F16 and BF16 are numbers.
    Names are those of the file: see `lowtide.weights.names.apply_names` to have others. Raises `CheckpointError` for a
    tensor of another kind.
    """
    entries = {name: _resting(name, entry, index.kinds.get(name)) for name, entry in index.items()}
    return CheckpointIndex(entries, index.files, index.metadata)


def _resting(name: str, entry: TensorEntry, number: int | None) -> TensorEntry:
    if number is None:
        return entry
    *outer, width = entry.shape
    if number == _BFLOAT16:
        return replace(entry, dtype=torch.bfloat16, shape=(*outer, width // 2))
    kind = KINDS[number]
    if kind.name not in {layout.name for layout in LAYOUTS.values()}:
        possible = ", ".join(layout.name for layout in LAYOUTS.values())
        raise CheckpointError(
            f"{entry.file}: tensor {name[:200]!r} is {kind.name}, in which models of Lowtide's own cannot rest. "
            f"Take a file of {possible}, F16, BF16 or F32, or have diffusers compute it: "
            "lowtide.load(MODEL, NETWORK='FILE.gguf')."
        )
    rows, inner = (outer[0], math.prod(outer[1:])) if outer else (1, 1)
    return replace(entry, shape=(rows, inner * width // kind.nbytes, kind.nbytes))


class _Claim(NamedTuple):
    """What a header says of a tensor: `shape` counts numbers, the outermost dimension first."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


class _Header:
    """A header, read from its beginning to its end."""

    def __init__(self, file: Path, stream: BufferedReader) -> None:
        self.file = file
        self.stream = stream
        self.place = 0

    def begin(self) -> tuple[int, int]:
        """The numbers of tensors and of settings."""
        if self._take(4) != b"GGUF":
            raise self._fault("it does not begin as a GGUF file")
        (version,) = self._numbers("I")
        if version not in _VERSIONS:
            raise self._fault(f"version {version} cannot be read; possible are {', '.join(map(str, _VERSIONS))}")
        tensors, settings = self._numbers("QQ")
        if tensors > MOST_TENSORS:
            raise self._fault(f"the header names {tensors} tensors; at most {MOST_TENSORS} are allowed")
        return tensors, settings

    def settings(self, count: int) -> int:
        """Go past the settings; the alignment of the data in bytes."""
        alignment = 32
        for _ in range(count):
            name, (kind,) = self._text(), self._numbers("I")
            value = self._value(kind)
            if name == _ALIGNMENT:
                alignment = value
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise self._fault(f"{_ALIGNMENT} is not possible")
        return alignment

    def tensors(self, count: int) -> Iterator[_Claim]:
        """What it says of each tensor."""
        for _ in range(count):
            name, (dimensions,) = self._text(), self._numbers("I")
            if dimensions > MAX_DIMENSIONS:
                raise self._fault(f"{name[:200]!r} has {dimensions} dimensions")
            shape = tuple(reversed(self._numbers(f"{dimensions}Q")))
            kind, offset = self._numbers("IQ")
            yield _Claim(name, kind, shape, offset)

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A setting's value; None for texts and lists, which nobody asks for."""
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _TEXT:
            self._text()
        elif kind == _ARRAY and depth < MOST_NESTED:
            inner, count = self._numbers("IQ")
            if inner in _SCALARS:
                self._take(count * struct.calcsize(_SCALARS[inner]))
                return None
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise self._fault(f"a setting of type {kind} cannot be read")
        return None

    def _text(self) -> str:
        return self._take(self._numbers("Q")[0]).decode("utf-8", "replace")

    def _numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, count: int) -> bytes:
        if self.place + count > MAX_HEADER_BYTES:
            raise self._fault(f"the header is longer than {MAX_HEADER_BYTES} bytes")
        content = self.stream.read(count)
        self.place += count
        if len(content) < count:
            raise self._fault("the file ends inside its header")
        return content

    def _fault(self, said: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {said}.")


def _checked(file: Path, claim: _Claim, start: int) -> TensorEntry:
    where = f"{file}: tensor {claim.name[:200]!r}"
    if claim.kind not in KINDS:
        names = ", ".join(kind.name for kind in KINDS.values())
        raise CheckpointError(
            f"{where} is of kind {claim.kind}, which diffusers cannot compute with; it can with {names}."
        )
    kind = KINDS[claim.kind]
    if not claim.shape or claim.shape[-1] % kind.numbers:
        raise CheckpointError(f"{where}: rows of {claim.shape[-1:]} numbers cannot be packed as {kind.name}.")
    dtype = _PLAIN.get(claim.kind, torch.uint8)
    width = claim.shape[-1] // kind.numbers * kind.nbytes // dtype.itemsize
    shape = (*claim.shape[:-1], width)
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    if start + claim.offset + nbytes > file.stat().st_size:
        raise CheckpointError(f"{where} reaches behind the end of the file. It is truncated: get it again.")
    return TensorEntry(file, start + claim.offset, nbytes, dtype, shape)
