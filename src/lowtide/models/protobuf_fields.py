"""The fields of a SentencePiece model, which is a protobuf message: https://protobuf.dev/programming-guides/encoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lowtide.configs import CheckpointError

NUMBER, EIGHT_BYTES, PART, FOUR_BYTES = 0, 1, 2, 5
"""Kinds of fields, of which a part has its length before it."""
SIZES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}


def parts_in(file: Path, message: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of a message's fields of a number, of those that are parts."""
    for field, kind, content in fields_in(file, message):
        if field == wanted and kind == PART and isinstance(content, bytes):
            yield content


def fields_in(file: Path, message: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Each field of a message in a file: its number, its kind and its contents.

    Raises `CheckpointError`, which names the file, where the message is malformed.
    """
    at = 0
    while at < len(message):
        key, at = _varint(file, message, at)
        kind = key & 7
        if kind == NUMBER:
            number, at = _varint(file, message, at)
            yield key >> 3, kind, number
            continue
        if kind == PART:
            size, at = _varint(file, message, at)
        elif kind in SIZES:
            size = SIZES[kind]
        else:
            raise unreadable(file, f"a field of kind {kind} at byte {at}.")
        if at + size > len(message):
            raise unreadable(file, f"it ends inside a field at byte {at}.")
        yield key >> 3, kind, message[at : at + size]
        at += size


def unreadable(file: Path, reason: str) -> CheckpointError:
    """The error for a file that is no SentencePiece model."""
    return CheckpointError(f"{file}: no SentencePiece model can be read from it: {reason}")


def _varint(file: Path, message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    number = 0
    for place, byte in enumerate(message[at : at + 10]):
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + place + 1
    raise unreadable(file, f"a number at byte {at} does not end.")
