"""What every pipeline can do about the memory of its activations: slices, tiles, rows, and kernels of attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowtide.activations.row_streaming import RowStreaming, row_streaming_of
from lowtide.activations.run import Progress
from lowtide.memory.rule import Tier
from lowtide.models.attention_backends import set_attention_backend, set_attention_slicing, xformers_or_sdpa
from lowtide.stages import Stage, Stages


class ActivationMethods:
    """Methods of `DiffusionPipeline` that set its autoencoder and the attention of all its networks."""

    vae: Any
    stages: Stages

    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        raise NotImplementedError

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one at a time: the memory of one, whatever the batch. Clips always are."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode a batch at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(
        self,
        mode: str = "blended",
        *,
        tile_size: int | tuple[int, int] | None = None,
        overlap: float | tuple[float, float] | None = None,
        rows: Tier | str | None = None,
        budget: int | str | None = None,
        work: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """Decode large pictures or clips in tiles ("blended"), or row by row with the whole one's result ("exact").

        See `AutoencoderKL.enable_tiling`.
        """
        self.vae.enable_tiling(
            mode, tile_size=tile_size, overlap=overlap, rows=rows, budget=budget, work=work, folder=folder
        )

    def disable_vae_tiling(self) -> None:
        """Decode pictures, or batches of frames, whole."""
        self.vae.disable_tiling()

    def set_attention_backend(
        self, backend: str, *, chunk_bytes: int | str | None = None, attention_op: Any = None
    ) -> None:
        """Choose how all attention of all components is computed; see `lowtide.ops.attention.AttentionBackend`.

        Raises `ValueError` for a backend that is not there, listing those that are; nothing is changed then.
        """
        set_attention_backend(self.modules().values(), backend, chunk_bytes=chunk_bytes, op=attention_op)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Compute attention with xFormers; without it, PyTorch's own memory-efficient kernels are used, with a note."""
        xformers_or_sdpa(self.modules().values(), attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to PyTorch's own choice of a kernel."""
        set_attention_backend(self.modules().values(), "sdpa")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute some heads at a time: half of them ("auto"), one ("max"), or a number; None computes all."""
        set_attention_slicing(self.modules().values(), slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute all heads at once."""
        set_attention_slicing(self.modules().values(), None)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent is high and wide."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_decoding(self, shape: tuple[int, ...]) -> None:
        """Raise now what decoding latents of this shape (a batch of one) would raise after all the steps."""
        streaming = self._streaming()
        if streaming is not None:
            getattr(self.vae, "check_decoding", streaming.check)(shape)

    def _streaming(self) -> RowStreaming | None:
        decoder = getattr(self.vae, "decoder", None)
        return row_streaming_of(decoder) if isinstance(decoder, nn.Module) else None

    @contextmanager
    def decoding(self, pictures: int, frames: int | None = None) -> Iterator[Callable[[int], None]]:
        """The stage "decode" of so many pictures or batches of frames; row by row it counts percent.

        Else it counts `frames`, where there are any: tell what it gives how many more are done.
        """
        streaming = self._streaming()
        with self.stages.stage("decode", steps=frames if streaming is None else 100) as stage:
            if streaming is None:
                yield lambda done: _advance(stage, done)
                return
            finished = 0

            def watch(progress: Progress) -> None:
                nonlocal finished
                percent = int(100 * (finished + progress.done / progress.total) / pictures)
                finished += progress.done == progress.total
                while stage.step < min(percent, 100):
                    stage.advance()

            streaming.watch = watch
            try:
                yield lambda done: None
            finally:
                streaming.watch = None


def _advance(stage: Stage, steps: int) -> None:
    for _ in range(steps):
        stage.advance()
