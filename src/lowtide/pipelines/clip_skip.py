"""CLIP's text encoder without its last layers, as some models were trained with."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def check_clip_skip(text_encoder: Any, clip_skip: int | None) -> None:
    """Raise `ValueError` unless it is None or a number of layers that the text encoder has."""
    if clip_skip is None:
        return
    layers = len(_layers(text_encoder))
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= layers:
        raise ValueError(
            f"clip_skip={clip_skip!r} is not possible: it is from 0 to {layers}, the layers of this text encoder."
        )


@contextmanager
def skipping_layers(text_encoder: Any, clip_skip: int | None) -> Generator[None]:
    """Have the last `clip_skip` layers hand on what they are given; the norm after them is computed.

    They are called all the same, so that weights come and go as ever, and no more memory is taken.
    """
    with ExitStack() as hooks:
        if clip_skip:
            for layer in _layers(text_encoder)[-clip_skip:]:
                handle = layer.register_forward_hook(_handed_on, with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def _handed_on(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _layers(text_encoder: Any) -> list[nn.Module]:
    model = getattr(text_encoder, "text_model", text_encoder)
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if layers is None:
        raise ValueError(f"clip_skip is not possible: a {type(text_encoder).__name__} has no encoder.layers to skip.")
    return list(layers)
