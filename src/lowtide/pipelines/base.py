"""What every pipeline can do besides its own call: load, offload, keep to budgets, show progress."""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch

from lowtide.casting.apply_casting import named_casting
from lowtide.casting.casting import Casting
from lowtide.configs import Config
from lowtide.fitting import fit as fitting
from lowtide.fitting.applied_plan import AppliedPlan
from lowtide.fitting.budgets import Asked, parse_budgets
from lowtide.fitting.call_lock import CallLock
from lowtide.fitting.checkpoints import check_only_budget, load_within
from lowtide.fitting.meta_subject import MetaSubject, meta_subject
from lowtide.fitting.observers import Tidy
from lowtide.fitting.resuming import resumed
from lowtide.fitting.run_report import RunReport
from lowtide.fitting.subject import TracedStage
from lowtide.hub import Source, file_of_link
from lowtide.loading.components import LoadOptions
from lowtide.loading.original_file import FileOptions
from lowtide.machine.heap import trim_heap
from lowtide.memory.presets import execution_device
from lowtide.models.load_arguments import AskedDtypes, check_not_pickled, chosen_dtypes, mapped_device
from lowtide.models.put_weights import offload_named
from lowtide.ops.modes import without_gradients
from lowtide.peer_names import INSTEAD, PeerNames, refuse_arguments
from lowtide.pipelines.decode_ways import DecodeWays
from lowtide.pipelines.decoding import check_streaming
from lowtide.pipelines.load import open_checkpoint, pipeline_config, pipeline_from
from lowtide.pipelines.memory_settings import MemorySettings
from lowtide.pipelines.offloading import held
from lowtide.pipelines.on_meta import on_meta
from lowtide.pipelines.running_call import RunningCall
from lowtide.pipelines.scheduler_claim import claimed
from lowtide.planning.plan import Plan, check_allowed
from lowtide.planning.run_size import RunSize
from lowtide.progress import ProgressBar, bar_options
from lowtide.stages import Stages
from lowtide.weights.provenance import check_files


class DiffusionPipeline(PeerNames, RunningCall, MemorySettings):
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
        self._progress_options: dict[str, Any] = {}

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
        torch_dtype: AskedDtypes = None,
        dtype: AskedDtypes = None,
        use_safetensors: bool | None = True,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        low_cpu_mem_usage: bool | None = True,
        device_map: str | torch.device | None = None,
        trust_remote_code: bool = False,
        offload: str | None = None,
        offload_device: torch.device | str | None = None,
        casting: Casting | str | None = None,
        vram: Asked = None,
        ram: Asked = None,
        disk: Asked = None,
        allow: Collection[str] = (),
        size: Mapping[str, Any] | None = None,
        file_options: FileOptions | None = None,
        **components: Any,
    ) -> Self:
        """Load from a folder with a `model_index.json`, or a Hub id, of which only the files needed are fetched.

        `dtype` (or `torch_dtype`, the older name) is the dtype to compute in: float32 if None, the files' own if
        "auto"; a dict has one for each component by name, and the others' as "default". `variant` takes the weights
        called so, such as "fp16", and the plain ones of components without. A component given by name is used instead
        of the checkpoint's; None leaves an optional one out; `vae` and `tokenizer` may be where theirs are: a folder, a
        Hub id, or a file of a VAE. `file_options` are for a file in place of the folder; see `from_single_file`.
        `device_map` moves all networks to "cuda" or "cpu" once
        they are loaded; "balanced" is the GPU if there is one. `low_cpu_mem_usage` and `trust_remote_code` have no
        effect: weights are always loaded in little memory, and a checkpoint's code is never run.
        With `offload` ("model", "block", "leaf" or "sequential") no weights are read now: they rest where they are,
        and come to `offload_device` (a GPU if there is one, else the CPU) when they are called.
        With `casting` ("fp8", "int8", "int4" or a `lowtide.Casting`) the weights of every network rest in so few bits.
        With a budget (`vram`, `ram`, `disk`; see `lowtide.fit`, also for `allow`) the memory of loading and of every
        call stays within it; the plan is made before any weights are read, for calls of this `size` (as for
        `lowtide.fit`) or the model's usual one, and computes on `offload_device`.
        Raises `FileNotFoundError` for a missing model, file or variant, `CheckpointError` for malformed files,
        `ValueError` for classes, components or settings that are not possible, `BudgetError` if no plan fits.
        """
        check_not_pickled(use_safetensors)
        own, others = cls._own_and_others(components)
        refuse_arguments("from_pretrained", others)
        default, dtypes = chosen_dtypes(torch_dtype, dtype)
        target = mapped_device(device_map, offload=offload, vram=vram, ram=ram, disk=disk)
        options = LoadOptions(default, variant, offload_named(offload, offload_device), named_casting(casting))
        cache = None if cache_dir is None else Path(cache_dir)
        source = Source(os.fspath(pretrained), revision, cache, token, local_files_only, force_download)
        own_class = None if cls is DiffusionPipeline else cls
        checkpoint = open_checkpoint(source, options, own_class, own, dtypes, file_options)
        check_allowed(allow)
        if (vram, ram, disk) != (None, None, None):
            check_only_budget(offload, casting, dtypes)
            device = execution_device(offload_device)
            budgets = parse_budgets(device, vram, ram, disk)
            return load_within(checkpoint, budgets, tuple(allow), device, size or {})
        if size is not None or allow:
            raise ValueError("size and allow are for a budget: give one of vram, ram and disk too, or leave them out.")
        loaded = checkpoint.load()
        trim_heap()
        return loaded if target is None else loaded.to(target)

    @classmethod
    def from_single_file(
        cls,
        file: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        **arguments: Any,
    ) -> Self:
        """Load Stable Diffusion 1.x or 2.x from one `.safetensors` file of original names, or its link on the Hub.

        The weights stay where they are in the file. What it lacks, configurations, scheduler and tokenizer, are those
        that were published for such models, or in the folder or Hub id `config`; the safety checker is left out. A
        model of the second kind is taken to predict velocity at 768 pixels, unless the file's metadata or
        `prediction_type` ("epsilon", "v_prediction") say another. `vae` is one to use in place of the file's, or where
        that is: a file, a folder or a Hub id. All other arguments are those of `from_pretrained`, and it raises the
        same, and `CheckpointError` for files of other models, which says what they hold.
        """
        options = FileOptions(None if config is None else os.fspath(config), prediction_type)
        names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
        asked = {name: arguments[name] for name in names if name in arguments}
        return cls.from_pretrained(file_of_link(Source(os.fspath(file), **asked)), file_options=options, **arguments)

    @classmethod
    def from_pipe(cls, pipeline: Any, *, torch_dtype: Any = None, dtype: Any = None, **components: Any) -> Self:
        """A pipeline of this class of the components of another, which both share, but for those given by name.

        With a `dtype` (or `torch_dtype`) the networks are moved to it; else they keep theirs. Raises `ValueError` for
        components that are missing.
        """
        own, others = cls._own_and_others(components)
        refuse_arguments("from_pipe", others)
        chosen = dtype or torch_dtype
        pipe = pipeline_from(cls, pipeline, own)
        return pipe if chosen is None else pipe.to(chosen)

    @classmethod
    def _own_and_others(cls, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Components and arguments of the class's own among some by name, and the peer's that no class takes."""
        own = {name: value for name, value in arguments.items() if name in cls.component_names or name not in INSTEAD}
        return own, {name: value for name, value in arguments.items() if name not in own}

    @property
    def config(self) -> Config:
        """What the pipeline is made of, as `model_index.json` has it: a mapping that is only read."""
        return pipeline_config(self)

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
        applied = self.applied  # once: another thread may undo it now
        return None if applied is None else applied.plan

    @property
    def degradations(self) -> list[str]:
        """What was made smaller since a budget was given, because memory ran out; in words, in order."""
        applied = self.applied
        return [] if applied is None else list(applied.degradations)

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

    def on_meta(self, device: torch.device) -> MetaSubject:
        """A copy with networks on meta, to be planned for a device; see `lowtide.fitting.subject.Subject`."""
        return meta_subject(self, device)

    def with_networks_on_meta(self, but: Collection[str] = ()) -> Self:
        """A copy with networks on meta, which decodes at once; it has those named in `but`, which are on meta."""
        return on_meta(self, but)

    def calls_in_steps(self, steps: int) -> dict[str, int]:
        """How often the denoising network is called in so many steps."""
        self.scheduler.set_timesteps(steps)
        return {"denoise": len(self.scheduler.timesteps)}

    # ---- a run

    def set_progress_bar_config(self, **options: Any) -> None:
        """Say how calls show their progress: see `lowtide.progress.bar_options`; what is not said is as at first."""
        self._progress_options = bar_options(**options)

    def lay_out_steps(
        self,
        num_inference_steps: int,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay out the scheduler's timesteps, or have it take those told, or these sigmas."""
        told = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: list(values) for name, values in told.items() if values is not None}
        steps = {} if given else {"num_inference_steps": num_inference_steps}
        self.scheduler.set_timesteps(**steps, **given, device=self.device)
        self._num_timesteps = len(self.scheduler.timesteps)

    def steps(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The steps and their timesteps, until a callback interrupts."""
        for step, timestep in enumerate(self.scheduler.timesteps):
            if self.interrupt:
                break
            self._current_timestep = timestep
            yield step, timestep
        self._current_timestep = None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent is high and wide."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def check_call(self, others: Mapping[str, Any]) -> None:
        """Raise for a call with arguments of the peer's among `others`, and for parts assigned since that do not fit.

        Before anything of the call is looked at: `UnfitPartsError`, a `ValueError`, says what is wrong with the parts.
        """
        refuse_arguments(type(self).__name__, others)
        self.check_parts()

    @contextmanager
    def running(self, size: RunSize | None = None) -> Generator[None]:
        """Bracket one call: no gradients, a progress bar, and everything put back whatever happens inside.

        Under a budget a call of another `size` than the last is planned anew; raises `BudgetError` if no plan fits.
        One thread at a time: another waits. Raises `CheckpointError` if a file in use was cut off or changed, or parts
        assigned since do not fit each other, and `RuntimeError` if the call is made from inside another one, such as
        from a callback, or while another pipeline goes through the same scheduler: its state would be lost.
        """
        with self.call_lock.call(), claimed(self.scheduler), without_gradients():
            self.check_parts()
            if size is not None:
                fitting.before_call(self, size)
            check_streaming(self.vae, self.device, size)
            check_files(tensor for module in self.modules().values() for tensor in module.parameters())
            bar = ProgressBar(**self._progress_options)
            tidy = Tidy(self.streams, every_step=self.applied is not None)
            measured = nullcontext() if self.applied is None else self.applied.measured()
            turn = () if self.applied is None else (self.applied.turn,)
            # And no `ExitStack`: what an interrupt in its end leaves waits for a collection of garbage, in any thread.
            with held((*self.streams(), *turn)), measured, self.stages.observed(bar, tidy):
                yield

    @resumed("denoise")
    def take_step(self, noise_pred: torch.Tensor, timestep: Any, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """The latents after one step of the scheduler."""
        return self.scheduler.step(noise_pred, timestep, latents, **options).prev_sample
