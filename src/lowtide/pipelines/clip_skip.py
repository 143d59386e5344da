"""CLIP's text encoder without its last layers, as some models were trained with."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
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


class _Skipped:
    """Layers that are left out, as long as the frame that says so keeps this."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = frozenset(layers)


_here: ContextVar[weakref.ref[_Skipped] | None] = ContextVar("lowtide_skipped_layers", default=None)


@contextmanager
def skipping_layers(text_encoder: Any, clip_skip: int | None) -> Generator[None]:
    """Have the last `clip_skip` layers hand on what they are given, in this thread; the norm after them is computed.

    They are called all the same, so that weights come and go as ever, and no more memory is taken.
    """
    if not clip_skip:
        yield
        return
    this, before = _Skipped(_layers(text_encoder)[-clip_skip:]), _here.get()
    with ExitStack() as hooks:
        try:
            _here.set(weakref.ref(this))
            for layer in this.layers:
                hooks.callback(layer.register_forward_hook(_handed_on, with_kwargs=True).remove)
            yield
        finally:
            _here.set(before)


def _handed_on(layer: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
    """What a layer gives in place of its output, in a thread that leaves it out.

    Its hook may be there for another thread, or for none any more: after an interrupt, and in a forked child. PyTorch
    leaves keywords out where another thread removes a hook just now.
    """
    skipped = reference() if (reference := _here.get()) is not None else None
    if skipped is None or layer not in skipped.layers:
        return None
    kwargs, output = kwargs_and_output
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _layers(text_encoder: Any) -> list[nn.Module]:
    model = getattr(text_encoder, "text_model", text_encoder)
    layers = getattr(getattr(model, "encoder", None), "layers", None)
    if layers is None:
        raise ValueError(f"clip_skip is not possible: a {type(text_encoder).__name__} has no encoder.layers to skip.")
    return list(layers)
