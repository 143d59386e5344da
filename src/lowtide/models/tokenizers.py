"""Load tokenizers from a checkpoint's folder, with an error where files are missing, malformed or say no length."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from lowtide.configs import CheckpointError
from lowtide.models.foreign import reading
from lowtide.models.text_tokenizer import TextTokenizer
from lowtide.models.vocabulary import check_vocabulary

BYTE_PAIRS, PIECES = ("vocab.json", "merges.txt"), ("spiece.model",)
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "CLIPTokenizer": BYTE_PAIRS,
    "CLIPTokenizerFast": BYTE_PAIRS,
    "T5Tokenizer": PIECES,
    "T5TokenizerFast": PIECES,
}
"""The classes, and the files that each can be read from where there is no `tokenizer.json`."""
MOST_TOKENS = 100_000
PROBE = "A sea, ½ of it \ufb01ne: 3 boats…"
"""A text that every tokenizer must be able to read, with characters that are replaced by others."""


class _Loaded(TextTokenizer):
    """Base: one that is read from a folder."""

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, subfolder: str = "", model_max_length: int | None = None
    ) -> Self:
        """Read a tokenizer from a folder; `model_max_length` replaces what the files say.

        Raises as `load_tokenizer`.
        """
        tokenizer = load_tokenizer(Path(folder) / subfolder, cls.__name__)
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        return tokenizer


class CLIPTokenizer(_Loaded):
    """Byte pairs of lower-case text, with a token at the start and one at the end."""

    usual: ClassVar[Mapping[str, str]] = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    word_end: ClassVar[str] = "</w>"


class T5Tokenizer(_Loaded):
    """Pieces of words by their probabilities, with a token at the end."""

    usual: ClassVar[Mapping[str, str]] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def load_tokenizer(folder: Path, class_name: str, vocabulary: Path | None = None) -> Any:
    """Read a tokenizer from `tokenizer.json`, or else from the older files of its class.

    Where these are not in the folder itself, they are in that of its `vocabulary`. Raises `FileNotFoundError` if there
    is no vocabulary, and `CheckpointError` for malformed files.
    """
    words = vocabulary or folder
    for each in {folder, words}:
        check_vocabulary(each)
    older = TOKENIZERS[class_name]
    has_older = all((words / name).is_file() for name in older)
    if not (words / "tokenizer.json").is_file() and not has_older:
        raise FileNotFoundError(f"{words} has neither tokenizer.json nor {' and '.join(older)}: no vocabulary.")
    cls: type[TextTokenizer] = T5Tokenizer if older == PIECES else CLIPTokenizer
    with reading(folder, class_name):
        from lowtide.models.tokenizer_files import read_backend, read_entries

        entries = read_entries(folder, cls.usual)
        tokenizer = cls(read_backend(words, entries, pieces=older == PIECES), entries.config, entries.special)
        tokenizer(PROBE)
    _check_length(folder, tokenizer, bounded=older == BYTE_PAIRS)
    return tokenizer


def _check_length(folder: Path, tokenizer: TextTokenizer, *, bounded: bool) -> None:
    """Raise unless the files give a length: CLIP's position embeddings end there (`bounded`), T5 has none."""
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length <= 2 or (bounded and length >= MOST_TOKENS):
        raise CheckpointError(f"{folder}/tokenizer_config.json: model_max_length={length!r:.80} is not possible.")
