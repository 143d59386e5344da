"""Read tokenizers from their files: `tokenizer.json`, `vocab.json` and `merges.txt` (CLIP), or `spiece.model` (T5).

A `spiece.model` is described by https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lowtide.configs import CheckpointError, read_bounded, read_json
from lowtide.models.protobuf_fields import FOUR_BYTES, NUMBER, PART, fields_in, parts_in, unreadable
from lowtide.models.text_tokenizer import NAMED
from lowtide.models.vocabulary import ADDED, MOST_VOCABULARY_BYTES, PIECES, TOKENIZER, WORDS

MERGES, CONFIG, SPECIAL = "merges.txt", "tokenizer_config.json", "special_tokens_map.json"
WORDS_OF_CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What one token is made of at most: a word, the end of one, a digit, or signs (Radford et al. 2021)."""
EXTRA_TOKENS = 100
"""Tokens that T5 has behind its pieces, where its files do not say how many."""
SPACE = "▁"
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Kinds of pieces."""
ALLOWED = ("content", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class TokenizerEntries:
    """What the small files beside a vocabulary say: `config`, special tokens by name, and tokens to add, in order."""

    config: Mapping[str, Any]
    special: Mapping[str, AddedToken]
    added: tuple[AddedToken, ...]


def read_entries(folder: Path, usual: Mapping[str, str]) -> TokenizerEntries:
    """The entries in a tokenizer's small files; `usual` are the special tokens where these say none."""
    config = _read(folder / CONFIG)
    listed = config.get("added_tokens_decoder")
    said: dict[str, Any] = {**usual, **config}
    added: list[AddedToken] = []
    if listed is None:
        said |= _read(folder / SPECIAL)
        words = sorted(_read(folder / ADDED).items(), key=lambda item: item[1])
        special = {_content(said.get(name)) for name in NAMED} | {_content(word) for word in _more(said)}
        added += [AddedToken(word, normalized=word not in special, special=word in special) for word, _ in words]
    else:
        added += [_token(token, special=None) for _, token in sorted(listed.items(), key=lambda item: int(item[0]))]
    named = {name: _token(said[name]) for name in NAMED if said.get(name) is not None}
    by_content = {token.content: token for token in added}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    last_said = {token.content: token for token in named.values()}  # one token may have several names
    return TokenizerEntries(config, named, (*added, *last_said.values(), *map(_token, _more(said))))


def read_backend(folder: Path, entries: TokenizerEntries, *, pieces: bool) -> Tokenizer:
    """The tokenizer in a folder's `tokenizer.json`, else in `spiece.model` (`pieces`) or the files of byte pairs."""
    if (folder / TOKENIZER).is_file():
        backend = Tokenizer.from_file(str(folder / TOKENIZER))
        backend.no_truncation()
        backend.no_padding()
        _add(backend, entries)
        return backend
    return _of_pieces(folder, entries) if pieces else _of_byte_pairs(folder, entries)


def _add(backend: Tokenizer, entries: TokenizerEntries, more: Iterable[AddedToken] = ()) -> None:
    """Add the tokens of the small files, and `more`, each once: the first that says a token says what it is like."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = {token.content for token in entries.special.values()}
    for token in (*entries.added, *more):
        if token.content not in known:
            token.special = token.special or token.content in named
            backend.add_tokens([token])
        known.add(token.content)


def _of_byte_pairs(folder: Path, entries: TokenizerEntries) -> Tokenizer:
    lines = read_bounded(folder / MERGES, MOST_VOCABULARY_BYTES).decode("utf-8").split("\n")
    merges = [_pair(folder, line) for line in lines if line and not line.startswith("#version")]
    words = read_json(folder / WORDS, MOST_VOCABULARY_BYTES)
    start, end, unknown = (entries.special[name].content for name in ("bos_token", "eos_token", "unk_token"))
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    backend = Tokenizer(models.BPE(words, merges, unk_token=unknown, **affixes))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS_OF_CLIP), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _add(backend, entries)
    last, first = ((token, number_of(backend, token)) for token in (end, start))
    backend.post_processor = processors.RobertaProcessing(last, first, trim_offsets=False, add_prefix_space=False)
    return backend


def number_of(backend: Tokenizer, token: str) -> int:
    """The number of a token that is there."""
    number = backend.token_to_id(token)
    assert number is not None
    return number


def _pair(folder: Path, line: str) -> tuple[str, str]:
    first, space, second = line.partition(" ")
    if not space or " " in second:
        raise CheckpointError(f"{folder / MERGES}: {line!r:.80} is no pair.")
    return first, second


def _of_pieces(folder: Path, entries: TokenizerEntries) -> Tokenizer:
    file = folder / PIECES
    model = read_bounded(file, MOST_VOCABULARY_BYTES)
    pieces = list(_pieces(file, model))
    unknown = next((number for number, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unknown is None:
        raise unreadable(file, "it has no unknown piece.")
    count = entries.config.get("extra_ids", EXTRA_TOKENS)
    extra = [f"<extra_id_{number}>" for number in range(count - 1, -1, -1)]
    vocabulary = [(piece, score) for piece, score, _ in pieces] + [(token, 0.0) for token in extra]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    for characters in (part for normalizer in parts_in(file, model, 3) for part in parts_in(file, normalizer, 2)):
        backend.normalizer = normalizers.Precompiled(characters)
    spaces: Any = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    backend.decoder = decoders.Metaspace(**spaces)
    end = entries.special["eos_token"].content
    whole = [(piece, kind == CONTROL) for piece, _, kind in pieces if kind in (CONTROL, USER_DEFINED)]
    whole += [(token, True) for token in extra]
    _add(backend, entries, [AddedToken(token, normalized=False, special=special) for token, special in whole])
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, number_of(backend, end))]
    )
    return backend


def _pieces(file: Path, model: bytes) -> Iterator[tuple[str, float, int]]:
    """Each piece of a SentencePiece model, its score, and its kind (1 if it is not said)."""
    for message in parts_in(file, model, 1):
        said = {(field, kind): content for field, kind, content in fields_in(file, message)}
        text, score, kind = said.get((1, PART), b""), said.get((2, FOUR_BYTES), bytes(4)), said.get((3, NUMBER), 1)
        assert isinstance(text, bytes)
        assert isinstance(score, bytes)
        assert isinstance(kind, int)
        try:
            yield text.decode("utf-8"), struct.unpack("<f", score)[0], kind
        except UnicodeDecodeError as error:
            raise unreadable(file, str(error)) from error


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, MOST_VOCABULARY_BYTES) if file.is_file() else {}


def _more(said: Mapping[str, Any]) -> list[Any]:
    """Further special tokens, without names."""
    listed = said.get("extra_special_tokens") or said.get("additional_special_tokens") or []
    return list(listed.values()) if isinstance(listed, dict) else list(listed)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(said: Any, special: bool | None = True) -> AddedToken:
    """A token as files say it: its text, or entries; `special` unless they tell, where that is None."""
    if isinstance(said, str):
        return AddedToken(said, special=True)
    if not isinstance(said, dict) or not isinstance(said.get("content"), str):
        raise ValueError(f"a token is text or has content, and is not {said!r:.80}")
    chosen = bool(said.get("special", False)) if special is None else special
    return AddedToken(**{name: said[name] for name in ALLOWED if name in said}, special=chosen)
