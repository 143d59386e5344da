"""What every pipeline can do besides its own call: load, offload, keep to budgets, show progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from lowtide.casting.apply_casting import named_casting
from lowtide.casting.casting import Casting
from lowtide.fitting import fit as fitting
from lowtide.fitting.applied_plan import AppliedPlan
from lowtide.fitting.budgets import Asked, parse_budgets
from lowtide.fitting.call_lock import CallLock
from lowtide.fitting.checkpoints import check_only_budget, load_within
from lowtide.fitting.observers import Tidy
from lowtide.fitting.resuming import resumed
from lowtide.fitting.run_report import RunReport
from lowtide.fitting.subject import TracedStage
from lowtide.hub import Source
from lowtide.loading.components import LoadOptions
from lowtide.machine.heap import trim_heap
from lowtide.memory.presets import execution_device, group_rule, model_rule, sequential_rule
from lowtide.memory.rule import Tier
from lowtide.models.attention_backends import set_attention_backend, set_attention_slicing, xformers_or_sdpa
from lowtide.models.mixin import chosen_dtype
from lowtide.models.put_weights import offload_named
from lowtide.pipelines.decode_ways import DecodeWays
from lowtide.pipelines.load import open_checkpoint
from lowtide.pipelines.named_components import Components
from lowtide.pipelines.offloading import end_offload, offload
from lowtide.pipelines.on_meta import on_meta
from lowtide.pipelines.scheduler_claim import claimed
from lowtide.planning.plan import Plan, check_allowed
from lowtide.planning.run_size import RunSize
from lowtide.progress import ProgressBar
from lowtide.stages import Stages
from lowtide.weights.provenance import check_files

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
"""Called after each step with the pipeline, the step, the timestep and the tensors asked for; it may change these."""


class DiffusionPipeline(Components):
    """Components by name, and the stages that a run goes through; a `lowtide.fitting.subject.Subject`.

    `DiffusionPipeline.from_pretrained` gives the pipeline that the checkpoint names. `stages.observers` may hold
    anything that watches a run, such as `lowtide.memory.Meter`; a copy of the pipeline begins without observers, and
    `copy.deepcopy` without offload.
    """

    scheduler: Any
    vae: Any

    def __init__(self) -> None:
        self.stages = Stages()
        self.applied: AppliedPlan | None = None
        self.call_lock = CallLock()
        self._progress_disabled = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but observers, lock and plan."""
        return {**self.__dict__, "stages": None, "call_lock": None, "applied": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, with stages and a lock of its own."""
        self.__dict__.update({**state, "stages": Stages(), "call_lock": CallLock()})

    # ---- loading

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = True,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        offload: str | None = None,
        offload_device: torch.device | str | None = None,
        casting: Casting | str | None = None,
        vram: Asked = None,
        ram: Asked = None,
        disk: Asked = None,
        allow: Collection[str] = (),
        size: Mapping[str, Any] | None = None,
        **components: Any,
    ) -> Self:
        """Load from a folder with a `model_index.json`, or a Hub id, of which only the files needed are fetched.

        `dtype` (or `torch_dtype`, the older name) is the dtype to compute in: float32 if None, the files' own if
        "auto". `variant` takes the weights called so, such as "fp16". A component given by name is used instead of the
        checkpoint's; None leaves an optional one out.
        With `offload` ("model", "block", "leaf" or "sequential") no weights are read now: they rest where they are,
        and come to `offload_device` (a GPU if there is one, else the CPU) when they are called.
        With `casting` ("fp8", "int8" or a `lowtide.Casting`) the weights of every network rest in 8 bits.
        With a budget (`vram`, `ram`, `disk`; see `lowtide.fit`, also for `allow`) the memory of loading and of every
        call stays within it; the plan is made before any weights are read, for calls of this `size` (as for
        `lowtide.fit`) or the model's usual one, and computes on `offload_device`.
        Raises `FileNotFoundError` for a missing model, file or variant, `CheckpointError` for malformed files,
        `ValueError` for classes, components or settings that are not possible, `BudgetError` if no plan fits.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False is not possible: pickled weights can run code, so they are refused."
            )
        dtype = chosen_dtype(torch_dtype, dtype)
        options = LoadOptions(dtype, variant, offload_named(offload, offload_device), named_casting(casting))
        cache = None if cache_dir is None else Path(cache_dir)
        source = Source(os.fspath(pretrained), revision, cache, token, local_files_only)
        checkpoint = open_checkpoint(source, options, None if cls is DiffusionPipeline else cls, components)
        check_allowed(allow)
        if (vram, ram, disk) != (None, None, None):
            check_only_budget(offload, casting)
            device = execution_device(offload_device)
            budgets = parse_budgets(device, vram, ram, disk)
            return load_within(checkpoint, budgets, tuple(allow), device, size or {})
        if size is not None or allow:
            raise ValueError("size and allow are for a budget: give one of vram, ram and disk too, or leave them out.")
        loaded = checkpoint.load()
        trim_heap()
        return loaded

    # ---- where weights rest

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Load the weights leaf by leaf as they are called: the least memory, and the slowest.

        Computes on CUDA device `gpu_id`, or on `device`; where there is no GPU, on the CPU, with the weights resting
        on disk in their checkpoint. Raises `ValueError` for a device that is not there.
        """
        chosen = execution_device(device, gpu_id)
        offload(self.modules(), sequential_rule(chosen), chosen)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Have one whole component on the device at a time, for as long as it is in use: little time, some memory.

        The device is chosen as for `enable_sequential_cpu_offload`.
        """
        chosen = execution_device(device, gpu_id)
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
        offload(self.modules(), rule, device, exclude_modules)

    def disable_sequential_cpu_offload(self) -> None:
        """Undo any offload of the components: their weights are where they were before."""
        end_offload(self.modules())

    disable_model_cpu_offload = disable_sequential_cpu_offload
    disable_group_offload = disable_sequential_cpu_offload

    # ---- activations

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

    # ---- budgets

    def fit(
        self,
        vram: Asked = None,
        ram: Asked = None,
        *,
        disk: Asked = None,
        allow: Collection[str] = (),
        device: torch.device | str | None = None,
        **size: Any,
    ) -> Plan:
        """Keep within budgets of bytes from now on, whatever is asked for, as fast as they allow; see `lowtide.fit`."""
        return fitting.fit(self, vram, ram, disk=disk, allow=allow, device=device, **size)

    def unfit(self) -> None:
        """Undo `fit`: no plan, no budget; every weight is where it was before, under the offload that was set then."""
        fitting.unfit(self)

    def apply_plan(self, plan: Plan, device: torch.device | str | None = None) -> None:
        """Put a plan to work, such as one saved as JSON; see `lowtide.fitting.fit.apply_plan`."""
        fitting.apply_plan(self, plan, device)

    @property
    def plan(self) -> Plan | None:
        """The plan at work, for the size asked for last; None where no budget was given."""
        return None if self.applied is None else self.applied.plan

    @property
    def degradations(self) -> list[str]:
        """What was made smaller since a budget was given, because memory ran out; in words, in order."""
        return [] if self.applied is None else list(self.applied.degradations)

    def report(self) -> RunReport:
        """What the last call took beside what its plan said; print it, or take its `to_dict`.

        Raises `RuntimeError` where no budget was given, or nothing has run since.
        """
        return fitting.report(self)

    # ---- what planning asks for

    @property
    def vocabulary(self) -> int:
        """Words that the tokenizer knows."""
        config = getattr(getattr(self, "text_encoder", None), "config", None)
        return getattr(config, "vocab_size", 0)

    def ways(self) -> dict[str, DecodeWays]:
        """The ways of the stage that decodes."""
        return {"decode": DecodeWays(self.vae)}

    def usual_size(self, **asked: Any) -> RunSize:
        """The size of a run where nothing else is said; raises `ValueError` for what is no part of a size."""
        raise NotImplementedError

    def traced_stages(self, size: RunSize) -> Iterator[TracedStage]:
        """The stages of a run, for a pipeline on meta."""
        raise NotImplementedError

    def on_meta(self) -> Self:
        """A copy with networks on meta, which decodes at once."""
        return on_meta(self)

    def calls_in_steps(self, steps: int) -> dict[str, int]:
        """How often the denoising network is called in so many steps."""
        self.scheduler.set_timesteps(steps)
        return {"denoise": len(self.scheduler.timesteps)}

    # ---- a run

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Show a progress bar during calls, or do not."""
        self._progress_disabled = disable

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent is high and wide."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @contextmanager
    def running(self, size: RunSize | None = None) -> Generator[None]:
        """Bracket one call: no gradients, a progress bar, and everything put back whatever happens inside.

        Under a budget a call of another `size` than the last is planned anew; raises `BudgetError` if no plan fits.
        One thread at a time: another waits. Raises `CheckpointError` if a file in use was cut off or changed, and
        `RuntimeError` if the call is made from inside another one, such as from a callback, or while another pipeline
        goes through the same scheduler: the scheduler's state would be lost.
        """
        with self.call_lock.call(), claimed(self.scheduler), torch.no_grad(), ExitStack() as stack:
            if size is not None:
                fitting.before_call(self, size)
            check_files(tensor for module in self.modules().values() for tensor in module.parameters())
            for stream in self.streams():
                stack.enter_context(stream.held())
            if self.applied is not None:
                stack.enter_context(self.applied.measured())
            bar = ProgressBar(disable=self._progress_disabled)
            tidy = Tidy(self.streams, every_step=self.applied is not None)
            stack.enter_context(self.stages.observed(bar, tidy))
            yield

    @resumed("denoise")
    def take_step(self, noise_pred: torch.Tensor, timestep: Any, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """The latents after one step of the scheduler."""
        return self.scheduler.step(noise_pred, timestep, latents, **options).prev_sample
