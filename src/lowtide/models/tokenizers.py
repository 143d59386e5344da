"""Load tokenizers of `transformers`, with an error where files are missing that the classes would do without."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from lowtide.configs import CheckpointError
from lowtide.models.foreign import reading
from lowtide.models.vocabulary import check_vocabulary

BYTE_PAIRS, PIECES = ("vocab.json", "merges.txt"), ("spiece.model",)
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "CLIPTokenizer": BYTE_PAIRS,
    "CLIPTokenizerFast": BYTE_PAIRS,
    "T5Tokenizer": PIECES,
    "T5TokenizerFast": PIECES,
}
"""The classes, and the files that each can be read from where there is no `tokenizer.json`."""
PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""The packages that read `spiece.model`, and their modules."""
MOST_TOKENS = 100_000
PROBE = "A sea, ½ of it \ufb01ne: 3 boats…"
"""A text that every tokenizer must be able to read, with characters that are replaced by others."""


def load_tokenizer(folder: Path, class_name: str) -> Any:
    """Read a tokenizer from `tokenizer.json`, or else from the older files of its class.

    Raises `FileNotFoundError` if there is no vocabulary, `CheckpointError` for malformed files, and
    `ImportError` if a package that reads them is missing.
    """
    check_vocabulary(folder)
    older = TOKENIZERS[class_name]
    has_older = all((folder / name).is_file() for name in older)
    if not (folder / "tokenizer.json").is_file():
        if not has_older:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor {' and '.join(older)}: no vocabulary.")
        if older == PIECES:
            _check_pieces(folder / older[0])
    with reading(folder, class_name):
        tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
        tokenizer(PROBE, verbose=False)
    _check_length(folder, tokenizer, bounded=older == BYTE_PAIRS)
    return tokenizer


def _check_pieces(file: Path) -> None:
    """Raise unless SentencePiece can read the file: `transformers` would try another format and report that alone."""
    missing = [package for package, module in PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise ImportError(
            f"{file} is read with {' and '.join(PACKAGES)}, and {' and '.join(missing)} cannot be imported. Run "
            f"`pip install {' '.join(missing)}`, or put a tokenizer.json beside it, which needs neither."
        )
    with reading(file, "SentencePiece model"):
        import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))


def _is_installed(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def _check_length(folder: Path, tokenizer: Any, *, bounded: bool) -> None:
    """Raise unless the files give a length: CLIP's position embeddings end there (`bounded`), T5 has none."""
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length <= 2 or (bounded and length >= MOST_TOKENS):
        raise CheckpointError(f"{folder}/tokenizer_config.json: model_max_length={length!r:.80} is not possible.")
