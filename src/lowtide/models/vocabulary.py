"""What the files of a tokenizer may hold, checked before libraries that panic or abort on other contents see them.

Free of torch. A `tokenizer.json` is described at https://huggingface.co/docs/tokenizers, a `spiece.model` in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.configs import CheckpointError, check_size, read_bounded, read_json
from lowtide.models.character_map import check_character_map
from lowtide.models.protobuf_fields import parts_in

MOST_VOCABULARY_BYTES = 8_000_000
"""The largest file of a tokenizer that is read; published ones of CLIP and T5 have up to 3,700,000 bytes."""
MOST_EXTRA_TOKENS = 10_000
MOST_DEPTH = 8
"""How deep normalizers may be nested."""
READ = (".json", ".txt", ".model", ".jinja")
TOKENIZER, WORDS, ADDED, PIECES = "tokenizer.json", "vocab.json", "added_tokens.json", "spiece.model"
PIECE_FIELD, NORMALIZER_FIELD, MAP_FIELD = 1, 3, 2


def check_vocabulary(folder: Path, most: int = MOST_VOCABULARY_BYTES) -> None:
    """Raise `CheckpointError`, which names file and entry, for files that cannot be handed to a library.

    None may be larger than `most` bytes.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in READ:
            check_size(file, most)
        if file.suffix == ".json":
            content = read_json(file, most)
            if file.name == TOKENIZER:
                _check_maps(file, content.get("normalizer"), "normalizer")
            if file.name == "tokenizer_config.json":
                _check_extra(file, content.get("extra_ids"))
    pieces = folder / PIECES
    if pieces.is_file():
        for normalizer in parts_in(pieces, read_bounded(pieces, most), NORMALIZER_FIELD):
            for charsmap in parts_in(pieces, normalizer, MAP_FIELD):
                check_character_map(charsmap, f"{pieces}: its map of characters")


def largest_token(folder: Path) -> int | None:
    """The largest number of a token that a tokenizer's files name; None where they name none."""
    numbers: list[int] = []
    if (folder / TOKENIZER).is_file():
        content = read_json(folder / TOKENIZER, MOST_VOCABULARY_BYTES)
        numbers += _numbers(_entry(content, "model", "vocab"))
        added = content.get("added_tokens")
        numbers += [token.get("id", 0) for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    elif (folder / WORDS).is_file():
        numbers += _numbers(read_json(folder / WORDS, MOST_VOCABULARY_BYTES))
        numbers += _numbers(read_json(folder / ADDED, MOST_VOCABULARY_BYTES)) if (folder / ADDED).is_file() else []
    elif (folder / PIECES).is_file():
        count = sum(1 for _ in parts_in(folder / PIECES, _bytes_of(folder / PIECES), PIECE_FIELD))
        numbers += [count - 1] if count else []
    return max((number for number in numbers if type(number) is int), default=None)


def _numbers(words: Any) -> list[Any]:
    """The numbers of words: values by word, or places in a list."""
    if isinstance(words, dict):
        return list(words.values())
    return [len(words) - 1] if isinstance(words, list) and words else []


def _entry(content: Mapping[str, Any], *names: str) -> Any:
    value: Any = content
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _check_maps(file: Path, normalizer: Any, where: str, depth: int = 0) -> None:
    """Check every map of characters in a normalizer and those inside it."""
    if depth > MOST_DEPTH:
        raise CheckpointError(f"{file}: {where[:80]} is nested too deep.")
    if not isinstance(normalizer, dict):
        return
    for number, inner in enumerate(_list(normalizer.get("normalizers"))):
        _check_maps(file, inner, f"{where}.normalizers[{number}]", depth + 1)
    if "precompiled_charsmap" in normalizer:
        encoded = normalizer["precompiled_charsmap"]
        what = f"{file}: {where}.precompiled_charsmap"
        if not isinstance(encoded, str):
            raise CheckpointError(f"{what} must be text, not a {type(encoded).__name__}.")
        if not encoded:
            raise CheckpointError(f"{what} is empty: leave the normalizer out where there is no map.")
        try:
            check_character_map(base64.b64decode(encoded, validate=True), what)
        except binascii.Error as error:
            raise CheckpointError(f"{what} is not base64: {error}") from error


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _check_extra(file: Path, count: Any) -> None:
    if count is not None and not (type(count) is int and 0 <= count <= MOST_EXTRA_TOKENS):
        raise CheckpointError(
            f"{file}: extra_ids={count!r:.80} is not possible; it is a whole number from 0 to {MOST_EXTRA_TOKENS}."
        )


def _bytes_of(file: Path) -> bytes:
    return read_bounded(file, MOST_VOCABULARY_BYTES)
