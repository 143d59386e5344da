"""The components of a pipeline: by name, moved together, saved together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lowtide.fitting.call_lock import CallLock
from lowtide.machine.accelerators import is_here, obstacle
from lowtide.memory.attach import detach
from lowtide.memory.rule_changes import attachment_of
from lowtide.memory.stream import Stream
from lowtide.pipelines.load import save_pipeline
from lowtide.pipelines.parts import KINDS, check_parts


class Components:
    """Attributes called `component_names`; the `optional_components` may be None."""

    component_names: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()
    setting_names: ClassVar[tuple[str, ...]] = ()
    """What the class is told beside its components."""
    call_lock: CallLock
    """One call at a time; what changes the components waits for those of other threads."""

    @property
    def components(self) -> dict[str, Any]:
        """Every component by name; optional ones may be None."""
        return {name: getattr(self, name) for name in self.component_names}

    def check_parts(self) -> None:
        """Raise `UnfitPartsError` unless the configurations of the components fit each other."""
        kind = next((cls.__name__ for cls in type(self).__mro__ if cls.__name__ in KINDS), None)
        if kind is not None:
            check_parts(kind, {name: getattr(part, "config", None) for name, part in self.components.items()})

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
        if device is not None and torch.device(device).type != "meta" and not is_here(torch.device(device)):
            raise ValueError(f"device={str(device)!r} is not possible: {obstacle(torch.device(device))}. Use 'cpu'.")
        with self.call_lock.alone():
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

    def in_dtype_of(self, network: Any, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype that a network computes in, if it says which."""
        return tensor.to(getattr(network, "dtype", tensor.dtype))

    def _a_weight(self) -> torch.Tensor:
        return next(p for module in self.modules().values() for p in module.parameters() if p.is_floating_point())

    def streams(self) -> list[Stream]:
        """The streams that bring the networks' weights to work, each once."""
        attachments = (attachment_of(module) for module in self.modules().values())
        return list(dict.fromkeys(attachment.stream for attachment in attachments if attachment is not None))

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write every component and the `model_index.json`, all or nothing: a killed save leaves what was there before.

        `max_shard_size` is in bytes, or text such as "5GB"; None writes each model as one file.
        """
        with self.call_lock.alone():
            save_pipeline(type(self).__name__, self.components, Path(folder), variant, max_shard_size)

    def __repr__(self) -> str:
        rows = (f"  {name}: {type(part).__name__}" for name, part in self.components.items())
        return "\n".join([f"{type(self).__name__}:", *rows])
