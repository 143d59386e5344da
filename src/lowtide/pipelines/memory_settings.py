"""The offloads and the ways to save activations of the document, set on a whole pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from lowtide.memory.presets import execution_device, group_rule, model_rule, sequential_rule
from lowtide.memory.rule import Tier
from lowtide.models.attention_backends import set_attention_backend, set_attention_slicing, xformers_or_sdpa
from lowtide.pipelines.named_components import Components
from lowtide.pipelines.offloading import end_offload, offload


class MemorySettings(Components):
    """Components whose memory is set by hand; each `enable_` has its `disable_`. All wait for other threads' calls."""

    vae: Any

    # ---- where weights rest

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Load the weights leaf by leaf as they are called: the least memory, and the slowest.

        Computes on CUDA device `gpu_id`, or on `device`; where there is no GPU, on the CPU, with the weights resting
        on disk in their checkpoint. Raises `ValueError` for a device that is not there.
        """
        chosen = execution_device(device, gpu_id)
        with self.call_lock.alone():
            offload(self.modules(), sequential_rule(chosen), chosen)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Have one whole component on the device at a time, for as long as it is in use: little time, some memory.

        The device is chosen as for `enable_sequential_cpu_offload`.
        """
        chosen = execution_device(device, gpu_id)
        with self.call_lock.alone():
            offload(self.modules(), model_rule(chosen), chosen)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Load the weights of every component group by group; see `lowtide.hooks.apply_group_offloading`.

        Components named in `exclude_modules` stay on `onload_device`.
        """
        device, rule = group_rule(
            onload_device, offload_device, offload_type, num_blocks_per_group, non_blocking, use_stream,
            record_stream, low_cpu_mem_usage, offload_to_disk_path,
        )  # fmt: skip
        with self.call_lock.alone():
            offload(self.modules(), rule, device, exclude_modules)

    def disable_sequential_cpu_offload(self) -> None:
        """Undo any offload of the components: their weights are where they were before."""
        with self.call_lock.alone():
            end_offload(self.modules())

    disable_model_cpu_offload = disable_sequential_cpu_offload
    disable_group_offload = disable_sequential_cpu_offload

    # ---- activations

    def enable_vae_slicing(self) -> None:
        """Decode the pictures of a batch one at a time: the memory of one, whatever the batch. Clips always are."""
        with self.call_lock.alone():
            self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode a batch at once."""
        with self.call_lock.alone():
            self.vae.disable_slicing()

    def enable_vae_tiling(
        self,
        mode: str | bool = "blended",
        *,
        tile_size: int | tuple[int, int] | None = None,
        overlap: float | tuple[float, float] | None = None,
        rows: Tier | str | None = None,
        budget: int | str | None = None,
        work: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
        **tile_attributes: float | None,
    ) -> None:
        """Decode large pictures or clips in tiles ("blended"), or row by row with the whole one's result ("exact").

        See `AutoencoderKL.enable_tiling`.
        """
        with self.call_lock.alone():
            self.vae.enable_tiling(
                mode, tile_size=tile_size, overlap=overlap, rows=rows, budget=budget, work=work, folder=folder,
                **tile_attributes,
            )  # fmt: skip

    def disable_vae_tiling(self) -> None:
        """Decode pictures, or batches of frames, whole."""
        with self.call_lock.alone():
            self.vae.disable_tiling()

    def set_attention_backend(
        self, backend: str, *, chunk_bytes: int | str | None = None, attention_op: Any = None
    ) -> None:
        """Choose how all attention of all components is computed; see `lowtide.ops.attention.AttentionBackend`.

        Raises `ValueError` for a backend that is not there, listing those that are; nothing is changed then.
        """
        with self.call_lock.alone():
            set_attention_backend(self.modules().values(), backend, chunk_bytes=chunk_bytes, op=attention_op)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Compute attention with xFormers; without it, PyTorch's own memory-efficient kernels are used, with a note."""
        with self.call_lock.alone():
            xformers_or_sdpa(self.modules().values(), attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to PyTorch's own choice of a kernel."""
        with self.call_lock.alone():
            set_attention_backend(self.modules().values(), "sdpa")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute some heads at a time: half of them ("auto"), one ("max"), or a number; None computes all."""
        with self.call_lock.alone():
            set_attention_slicing(self.modules().values(), slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute all heads at once."""
        with self.call_lock.alone():
            set_attention_slicing(self.modules().values(), None)
