"""What every pipeline can do besides its own call: load, save, move, show progress."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lowtide.casting.apply_casting import named_casting
from lowtide.casting.casting import Casting
from lowtide.configs import write_json
from lowtide.fitting.apply import FittingMethods
from lowtide.fitting.budgets import Asked, AskedBudgets
from lowtide.fitting.checkpoints import check_only_budget, load_within
from lowtide.fitting.observers import Tidy
from lowtide.fitting.resuming import resumed
from lowtide.hub import Source
from lowtide.loading import (
    MODEL_INDEX,
    ComponentSpec,
    LoadOptions,
    load_components,
    read_model_index,
    save_component,
    spec_of,
)
from lowtide.machine.heap import trim_heap
from lowtide.memory.attach import attachment_of, detach
from lowtide.memory.presets import execution_device
from lowtide.memory.stream import Stream
from lowtide.models.mixin import PEER_VERSION, chosen_dtype
from lowtide.models.put_weights import offload_named
from lowtide.pipelines.activations import ActivationMethods
from lowtide.pipelines.offloading import OffloadMethods
from lowtide.planning.run_size import RunSize
from lowtide.progress import ProgressBar
from lowtide.stages import Stages
from lowtide.weights.provenance import check_files
from lowtide.weights.save import atomic_folder

PIPELINES = {
    "StableDiffusionPipeline": "lowtide.pipelines.stable_diffusion",
    "CogVideoXPipeline": "lowtide.pipelines.cogvideox",
}

_stepping: dict[int, Any] = {}
"""The schedulers that runs are going through, by their ids: no entry of their own, so that copies are free."""
_stepping_lock = threading.Lock()

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]
"""Called after each step with the pipeline, the step, the timestep and the tensors asked for; it may change these."""


class DiffusionPipeline(FittingMethods, OffloadMethods, ActivationMethods):
    """Components by name, and the stages that a run goes through.

    `DiffusionPipeline.from_pretrained` gives the pipeline that the checkpoint names. `stages.observers` may hold
    anything that watches a run, such as `lowtide.memory.Meter`; a copy of the pipeline begins without observers, and
    `copy.deepcopy` without offload.
    """

    scheduler: Any
    component_names: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.stages = Stages()
        self._fit = None
        self._progress_disabled = False
        self._lock = threading.RLock()
        self._is_running = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but the lock, as of a pipeline that is not being called and has no plan."""
        return {**self.__dict__, "stages": Stages(), "_lock": None, "_is_running": False, "_fit": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave, with a lock of its own."""
        self.__dict__.update({**state, "_lock": threading.RLock()})

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
        chosen = chosen_dtype(torch_dtype, dtype)
        options = LoadOptions(chosen, variant, offload_named(offload, offload_device), named_casting(casting))
        cache = None if cache_dir is None else Path(cache_dir)
        source = Source(os.fspath(pretrained), revision, cache, token, local_files_only)
        class_name, specs, _ = read_model_index(source.fetch([MODEL_INDEX]))
        pipeline_class = cls if cls is not DiffusionPipeline else _pipeline_class(class_name)
        if class_name in PIPELINES and not issubclass(pipeline_class, _pipeline_class(class_name)):
            raise ValueError(
                f"{pretrained} holds a {class_name}, not a {cls.__name__}: load it with that class, or with "
                "DiffusionPipeline, which takes the checkpoint's own."
            )
        to_load = pipeline_class._to_load(specs, components)
        asked = AskedBudgets.of(vram, ram, disk, allow)
        if asked.are_given:
            check_only_budget(offload, casting)
            device = execution_device(offload_device)
            return load_within(pipeline_class, source, to_load, options, components, asked, device, size or {})
        if size is not None or asked.allow:
            raise ValueError("size and allow are for a budget: give one of vram, ram and disk too, or leave them out.")
        loaded = pipeline_class(**components, **load_components(source, to_load, options))
        trim_heap()
        return loaded

    @classmethod
    def _to_load(cls, specs: dict[str, ComponentSpec | None], given: dict[str, Any]) -> dict[str, ComponentSpec | None]:
        """The components to load: those of this pipeline that were not given."""
        unknown = sorted(set(given) - set(cls.component_names))
        if unknown:
            raise ValueError(f"{cls.__name__} takes no {unknown}; its components are {', '.join(cls.component_names)}.")
        chosen = {name: specs.get(name) for name in cls.component_names if name not in given}
        strange = [name for name, spec in specs.items() if spec is not None and name not in cls.component_names]
        if strange:
            warnings.warn(f"{cls.__name__} has no use for the checkpoint's {', '.join(strange)}.", stacklevel=3)
        missing = [name for name, spec in chosen.items() if spec is None and name not in cls.optional_components]
        if missing:
            raise ValueError(
                f"The checkpoint has no {', '.join(missing)}: pass it in, as in from_pretrained(..., {missing[0]}=...)."
            )
        return chosen

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write every component and the `model_index.json`, all or nothing: a killed save leaves what was there before.

        `max_shard_size` is in bytes, or text such as "5GB"; None writes each model as one file.
        """
        specs = {name: spec_of(name, part) for name, part in self.components.items() if part is not None}
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": PEER_VERSION}
        for name in self.component_names:
            index[name] = [specs[name].library, specs[name].class_name] if name in specs else [None, None]
        with atomic_folder(Path(folder)) as target:
            for name in specs:
                save_component(self.components[name], target / name, variant=variant, max_shard_size=max_shard_size)
            write_json(target / MODEL_INDEX, index)

    @property
    def components(self) -> dict[str, Any]:
        """Every component by name; optional ones may be None."""
        return {name: getattr(self, name) for name in self.component_names}

    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    def to(
        self,
        *targets: torch.device | torch.dtype | str | int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move the networks to a device, a dtype, or both, given as for `torch.nn.Module.to`; return the pipeline.

        A device given ends any offload: everything is there from then on.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = torch.device(target)
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r} is not possible: PyTorch sees no CUDA device here. Use 'cpu'.")
        for module in self.modules().values():
            if device is not None:
                detach(module)
            module.to(device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """The device the networks compute on."""
        return self._a_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the networks compute in."""
        return self._a_weight().dtype

    def _a_weight(self) -> torch.Tensor:
        return next(p for module in self.modules().values() for p in module.parameters() if p.is_floating_point())

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Show a progress bar during calls, or do not."""
        self._progress_disabled = disable

    @contextmanager
    def running(self, size: RunSize | None = None) -> Iterator[None]:
        """Bracket one call: no gradients, a progress bar, and everything put back whatever happens inside.

        Under a budget a call of another `size` than the last is planned anew; raises `BudgetError` if no plan fits.
        One thread at a time: another waits. Raises `CheckpointError` if a file in use was cut off or changed, and
        `RuntimeError` if the call is made from inside another one, such as from a callback, or while another pipeline
        goes through the same scheduler: the scheduler's state would be lost.
        """
        with self._lock, ExitStack() as stack:
            if self._is_running:
                raise RuntimeError(
                    "This pipeline is being called already, and a callback cannot call it again: the scheduler's state "
                    "would be lost. Build a second pipeline from the same components and another scheduler."
                )
            stack.enter_context(_stepping_through(getattr(self, "scheduler", None)))
            if size is not None:
                self._prepare(size)
            check_files(tensor for module in self.modules().values() for tensor in module.parameters())
            self._is_running = True
            stack.callback(setattr, self, "_is_running", False)
            for stream in self._streams():
                stack.enter_context(stream.held())
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._measured())
            bar = ProgressBar(disable=self._progress_disabled)
            stack.enter_context(self.stages.observed(bar, Tidy(self._streams, every_step=self.plan is not None)))
            yield

    @resumed("denoise")
    def take_step(self, noise_pred: torch.Tensor, timestep: Any, latents: torch.Tensor, **options: Any) -> torch.Tensor:
        """The latents after one step of the scheduler."""
        return self.scheduler.step(noise_pred, timestep, latents, **options).prev_sample

    def _streams(self) -> list[Stream]:
        attachments = [attachment_of(module) for module in self.modules().values()]
        return list({id(one.stream): one.stream for one in attachments if one is not None}.values())

    def __repr__(self) -> str:
        rows = (f"  {name}: {type(part).__name__}" for name, part in self.components.items())
        return "\n".join([f"{type(self).__name__}:", *rows])


@contextmanager
def _stepping_through(scheduler: Any) -> Iterator[None]:
    """Claim a scheduler for one run."""
    with _stepping_lock:
        if id(scheduler) in _stepping:
            raise RuntimeError(
                "This pipeline's scheduler is in use already, by a call of another pipeline: the scheduler's state "
                "would be lost. Give each pipeline its own, as in "
                f"pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config)."
            )
        if scheduler is not None:
            _stepping[id(scheduler)] = scheduler
    try:
        yield
    finally:
        with _stepping_lock:
            _stepping.pop(id(scheduler), None)


def _pipeline_class(name: str) -> type[Any]:
    if name not in PIPELINES:
        raise ValueError(
            f"The checkpoint is a {name or 'pipeline without a name'}; Lowtide has {', '.join(PIPELINES)}."
        )
    return getattr(importlib.import_module(PIPELINES[name]), name)
