"""Tokenizers of every kind that guests use, with vocabularies of single bytes and a few words."""

from __future__ import annotations

from typing import Any

WORDS = ["a", "red", "boat", "on", "the", "sea", "at", "night", "with", "stars"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A template for chats as Qwen's are: a role and its text between two marks."""


def alphabet() -> list[str]:
    """The 256 characters that stand for single bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def numbered(entries: list[str]) -> dict[str, int]:
    """A vocabulary: every entry once, with its place."""
    return {entry: place for place, entry in enumerate(dict.fromkeys(entries))}


def merges_of(words: list[str], start: str = "", end: str = "") -> list[tuple[str, str]]:
    """The merges that build each word from its letters, from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*([start] if start else []), *word]
        letters[-1] += end
        for place in range(1, len(letters)):
            merges["".join(letters[:place]), letters[place]] = None
    return list(merges)


def clip(max_tokens: int = 16) -> Any:
    """CLIP's tokenizer: pairs of bytes, with the ends of words marked."""
    from transformers import CLIPTokenizer

    letters, merges = alphabet(), merges_of(WORDS, end="</w>")
    marks = ["<|startoftext|>", "<|endoftext|>"]
    entries = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *marks]
    return CLIPTokenizer(numbered(entries), merges, model_max_length=max_tokens)


def t5(max_tokens: int = 32) -> Any:
    """T5's tokenizer, also UMT5's: a unigram model of pieces with scores."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.01 * place) for place, word in enumerate(WORDS)]
    pieces += [(chr(code), -8.0 - 0.01 * code) for code in range(33, 127)]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=max_tokens)


def qwen(max_tokens: int = 1024, **options: Any) -> Any:
    """Qwen's tokenizer: pairs of bytes, with marks for chats and a template for them."""
    from transformers import Qwen2Tokenizer

    merges = merges_of(WORDS, start="Ġ")
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = numbered([*alphabet(), *(a + b for a, b in merges), *marks])
    extra = {"additional_special_tokens": marks[1:], "chat_template": CHAT, "model_max_length": max_tokens}
    return Qwen2Tokenizer(vocabulary, merges, **{**extra, **options})


def byte_pieces() -> list[str]:
    """The 256 entries to which Gemma's and Llama's tokenizers fall back for characters they do not know."""
    return [f"<0x{code:02X}>" for code in range(256)]


def gemma(max_tokens: int = 256, **options: Any) -> Any:
    """Gemma's tokenizer: pairs of characters, spaces written as a low line."""
    from transformers import GemmaTokenizer

    merges = merges_of(WORDS)
    letters = [chr(code) for code in range(33, 127)]
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = numbered([*marks, *byte_pieces(), "▁", *letters, *(a + b for a, b in merges)])
    return GemmaTokenizer(vocabulary, merges, **{"model_max_length": max_tokens, **options})


def llama(max_tokens: int = 256, **options: Any) -> Any:
    """Llama's tokenizer: pairs of characters, a low line before each word."""
    from transformers import LlamaTokenizer

    merges = merges_of(WORDS, start="▁")
    letters = [chr(code) for code in range(33, 127)]
    marks = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = numbered([*marks, *byte_pieces(), "▁", *letters, *(a + b for a, b in merges)])
    options = {"pad_token": "<pad>", "model_max_length": max_tokens, **options}
    return LlamaTokenizer(vocabulary, merges, **options)
