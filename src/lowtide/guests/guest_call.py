"""One call of a foreign pipeline: its arguments, and what of them decides the memory that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from lowtide.guests.networks import components_of

PROMPT = "A photo of a boat on the sea"
"""What is assumed where a prompt is needed and none was told."""
_PLAIN = (bool, int, float, str, type(None))
_STEPS = ("num_inference_steps", "steps")


class GuestCall:
    """The arguments of a call by name. Two calls are equal where they take the same memory."""

    def __init__(self, arguments: Mapping[str, Any], key: tuple[Any, ...]) -> None:
        self.arguments = dict(arguments)
        self._key = key

    @classmethod
    def of(cls, pipe: Any, arguments: Mapping[str, Any]) -> GuestCall:
        """A call of a pipeline. Raises `TypeError` for arguments that it does not take."""
        signature = call_signature(pipe)
        names = set(signature.parameters)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        unknown = sorted(set(arguments) - names)
        if unknown and not takes_any:
            kind, possible = type(pipe).__name__, ", ".join(sorted(names))
            raise TypeError(f"A call of {kind} takes no {', '.join(unknown)}; it takes {possible}.")
        told = dict(arguments)
        if "prompt" in names and not any(told.get(name) is not None for name in ("prompt", "prompt_embeds")):
            told["prompt"] = PROMPT
        forms = (
            (name, _form(value, _words(name, pipe))) for name, value in sorted(told.items()) if not _is_idle(value)
        )
        key = tuple(forms)
        return cls(told, key)

    @classmethod
    def bound(cls, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GuestCall:
        """A call with arguments as they were given."""
        return cls.of(pipe, call_signature(pipe).bind_partial(*args).arguments | dict(kwargs))

    @property
    def steps(self) -> int | None:
        """The steps that were asked for, if they were."""
        asked = (self.arguments.get(name) for name in _STEPS)
        return next((steps for steps in asked if isinstance(steps, int)), None)

    def to_dict(self) -> dict[str, Any]:
        """What of the arguments JSON can hold: numbers and words."""
        return {name: value for name, value in self.arguments.items() if _is_plain(value) and value is not None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuestCall) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r:.40}" for name, value in self.to_dict().items())


def call_signature(pipe: Any) -> inspect.Signature:
    """The signature of a pipeline's call, without itself."""
    return inspect.signature(pipe.__call__)


def _is_idle(value: Any) -> bool:
    """Whether a value changes no memory."""
    return value is None or isinstance(value, torch.Generator) or (callable(value) and not hasattr(value, "shape"))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _form(value: Any, words: Callable[[str], Any]) -> Any:
    """What of a value decides the memory of a call: of `words` what is made of them, of pictures their size."""
    if isinstance(value, str):
        return "text", words(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_form(item, words) for item in value if not isinstance(item, torch.Generator))
    if is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, Mapping):
        return tuple((name, _form(item, words)) for name, item in sorted(value.items()))
    shape = getattr(value, "shape", None) or getattr(value, "size", None)
    if shape is not None and not callable(shape):
        return type(value).__name__, tuple(shape), str(getattr(value, "dtype", getattr(value, "mode", "")))
    return type(value).__name__


def _words(name: str, pipe: Any) -> Callable[[str], Any]:
    """What decides of the words of an argument: of a prompt how many tokens they are, of others which they are.

    "latent" and "np" may be as many tokens, and a call for the one decodes nothing.
    """
    if "prompt" not in name:
        return str
    tokenizers = list(_tokenizers(pipe))
    return lambda text: tuple(len(tokenizer(text)["input_ids"]) for tokenizer in tokenizers) or text


def _tokenizers(pipe: Any) -> Iterator[Any]:
    """The tokenizers among a pipeline's components, and those inside its processors.

    A processor of pictures and words, which takes pictures first, may be called a tokenizer too: FLUX.2, Kandinsky 5.
    """
    for name, part in components_of(pipe).items():
        inner = getattr(part, "tokenizer", None)
        if callable(inner):
            yield inner
        elif "tokenizer" in name and callable(part):
            yield part
