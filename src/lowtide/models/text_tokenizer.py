"""Tokenizers: texts to numbers of tokens and back, with the names and calls of the classes in `transformers`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowtide.configs import write_json
from lowtide.models.prepared_inputs import PreparedInputs

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer

NO_LENGTH = int(1e30)
"""`model_max_length` of tokenizers whose files say none."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PADDINGS = (False, True, None, "longest", "max_length", "do_not_pad")
Texts = str | Sequence[str]


class TextTokenizer:
    """Base: a tokenizer of the library `tokenizers`, special tokens by name, and the entries of its files."""

    library: ClassVar[str] = "transformers"
    usual: ClassVar[Mapping[str, str]] = {}
    """The special tokens where files do not say them."""
    word_end: ClassVar[str] = ""
    """What pieces that end a word have behind them."""

    def __init__(self, backend: Tokenizer, entries: Mapping[str, Any], special: Mapping[str, AddedToken]) -> None:
        self.backend, self.entries = backend, dict(entries)
        self.special_tokens_map = {name: token.content for name, token in special.items()}
        length = entries.get("model_max_length", entries.get("max_len"))
        self.model_max_length: Any = NO_LENGTH if length is None else length
        self.padding_side: str = entries.get("padding_side", "right")

    def __call__(
        self,
        text: Texts,
        *,
        padding: bool | str | None = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        verbose: bool = True,
    ) -> PreparedInputs:
        """Numbers of tokens as `input_ids`, and as `attention_mask` 1 for each that is not padding.

        Lists, one for each text (or one, for a single text), or with `return_tensors="pt"` tensors `[B, L]`. With
        `truncation`, texts keep at most `max_length` tokens (if None, as many as the model has positions for).
        `padding` fills them up to the longest (True), or to that length ("max_length"). `verbose` has no effect.
        """
        del verbose
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} is not possible: give one of {PADDINGS}.")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r} is not possible: give 'pt' or None.")
        texts = [text] if isinstance(text, str) else list(text)
        for each in texts:
            if not isinstance(each, str):
                raise ValueError(f"A tokenizer reads text, not a {type(each).__name__}.")
        most = self.model_max_length if max_length is None else max_length
        limit = most if truncation not in (False, None, "do_not_truncate") and most < NO_LENGTH else None
        rows = [self._numbers(each, add_special_tokens, limit) for each in texts]
        to_length = padding == "max_length" and most < NO_LENGTH
        width = most if to_length else max(map(len, rows), default=0) if padding in (True, "longest") else 0
        masks = [self._padded([1] * len(row), 0, width) for row in rows]
        inputs = {"input_ids": [self._padded(row, self._pad_id(), width) for row in rows], "attention_mask": masks}
        if not return_attention_mask:
            del inputs["attention_mask"]
        if return_tensors == "pt":
            return PreparedInputs({name: _tensor(rows) for name, rows in inputs.items()})
        return PreparedInputs({name: rows[0] if isinstance(text, str) else rows for name, rows in inputs.items()})

    def encode(self, text: str, **options: Any) -> Any:
        """The numbers of one text's tokens; options as of a call."""
        return self(text, **options)["input_ids"]

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text."""
        return self._encoding(text, add_special_tokens, None).tokens

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text that tokens, a list or a tensor of numbers, stand for."""
        numbers = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        numbers = [numbers] if isinstance(numbers, int) else list(numbers)
        text = self.backend.decode(numbers, skip_special_tokens=skip_special_tokens)
        return text.replace(self.word_end, " ").strip() if self.word_end else text

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **_: Any) -> list[str]:
        """The texts of several lists of tokens, or of a tensor's rows."""
        return [self.decode(numbers, skip_special_tokens) for numbers in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The number of a token, or numbers of several; that of the unknown token where there is none."""
        if isinstance(tokens, str):
            number = self.backend.token_to_id(tokens)
            return self.unk_token_id if number is None else number
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of a number, or tokens of several."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(int(number)) for number in ids]

    def add_tokens(self, new_tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Give words numbers of their own behind all others; returns how many are new."""
        words = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        return self.backend.add_special_tokens(words) if special_tokens else self.backend.add_tokens(words)

    def get_vocab(self) -> dict[str, int]:
        """The number of every token."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The numbers of tokens that are found in a text as they are, the special ones among them."""
        return {token.content: number for number, token in self.backend.get_added_tokens_decoder().items()}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend.save(str(Path(folder) / "tokenizer.json"))
        own = {"tokenizer_class": type(self).__name__, "model_max_length": self.model_max_length}
        write_json(Path(folder) / "tokenizer_config.json", {**self.entries, **self.special_tokens_map, **own})

    @property
    def vocab_size(self) -> int:
        """Tokens without those added."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, those with names first."""
        added = self.backend.get_added_tokens_decoder().values()
        others = [token.content for token in added if token.special]
        return list(dict.fromkeys([*self.special_tokens_map.values(), *others]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their numbers."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def unk_token_id(self) -> int | None:
        """The number of the unknown token."""
        name = self.special_tokens_map.get("unk_token")
        return None if name is None else self.backend.token_to_id(name)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    if not TYPE_CHECKING:  # a checker would take every name for a token

        def __getattr__(self, name: str) -> Any:
            """A special token, as `eos_token`, or its number, as `eos_token_id`; None where there is none."""
            token, named = name.removesuffix("_id"), self.__dict__.get("special_tokens_map", {})
            if token not in NAMED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return named.get(token) if token == name else self.backend.token_to_id(named.get(token, ""))

    def _numbers(self, text: str, add_special_tokens: bool, limit: int | None) -> list[int]:
        return self._encoding(text, add_special_tokens, limit).ids

    def _encoding(self, text: str, add_special_tokens: bool, limit: int | None) -> Encoding:
        """A text's tokens, at most `limit` of them, the special ones among them."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if limit is None or len(encoding) <= limit:
            return encoding
        special = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if limit < special:
            raise ValueError(f"max_length={limit} is not possible: there are {special} special tokens.")
        encoding = self.backend.encode(text, add_special_tokens=False)
        encoding.truncate(limit - special)
        return self.backend.post_process(encoding, add_special_tokens=add_special_tokens)

    def _padded(self, row: list[int], value: int, width: int) -> list[int]:
        filling = [value] * (width - len(row))
        return filling + row if self.padding_side == "left" else row + filling

    def _pad_id(self) -> int:
        name = self.special_tokens_map.get("pad_token")
        number = None if name is None else self.backend.token_to_id(name)
        return 0 if number is None else number


def _tensor(rows: list[list[int]]) -> Any:
    import torch

    if len({len(row) for row in rows}) > 1:
        raise ValueError("Texts of different lengths make no tensor: give padding=True or padding='max_length'.")
    return torch.tensor(rows, dtype=torch.long)
