"""The stage that decodes: its progress, whether at once or row by row, and a check of it before all the steps."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowtide.activations.recording import check_no_autocast
from lowtide.activations.row_streaming import RowStreaming, row_streaming_of
from lowtide.activations.run import Progress, watched
from lowtide.planning.run_size import RunSize
from lowtide.stages import Stage, Stages


def check_decoding(vae: Any, shape: tuple[int, ...]) -> None:
    """Raise now what decoding latents of this shape (a batch of one) would raise after all the steps."""
    streaming = _streaming(vae)
    if streaming is not None:
        getattr(vae, "check_decoding", streaming.check)(shape)


def check_streaming(vae: Any, device: torch.device, size: RunSize | None) -> None:
    """Raise `NotByRowsError` before any step where the way to decode that is set cannot be gone now."""
    if _streaming(vae) is not None and (size is None or size.output != "latent"):
        check_no_autocast(vae.decoder, device)


@contextmanager
def decoding(stages: Stages, vae: Any, pictures: int, frames: int | None = None) -> Generator[Callable[[int], None]]:
    """The stage "decode" of so many pictures or batches of frames; row by row it counts percent.

    Else it counts `frames`, where there are any: tell what it gives how many more are done.
    """
    streaming = _streaming(vae)
    with stages.stage("decode", steps=frames if streaming is None else 100) as stage:
        if streaming is None:
            yield lambda done: _advance(stage, done)
            return
        watch = _percent_of(stage, pictures)
        with watched(watch):
            yield lambda done: None


def _percent_of(stage: Stage, pictures: int) -> Callable[[Progress], None]:
    finished = 0

    def watch(progress: Progress) -> None:
        nonlocal finished
        percent = int(100 * (finished + progress.done / progress.total) / pictures)
        finished += progress.done == progress.total
        _advance(stage, min(percent, 100) - stage.step)

    return watch


def _streaming(vae: Any) -> RowStreaming | None:
    decoder = getattr(vae, "decoder", None)
    return row_streaming_of(decoder) if isinstance(decoder, nn.Module) else None


def _advance(stage: Stage, steps: int) -> None:
    for _ in range(steps):
        stage.advance()
