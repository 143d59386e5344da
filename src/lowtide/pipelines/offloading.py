"""What every pipeline can do about the memory of its weights: the offloads of the document, each a rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lowtide.memory.attach import detach
from lowtide.memory.presets import attach_all, execution_device, group_rule, model_rule, sequential_rule
from lowtide.memory.rule import Rule


class OffloadMethods:
    """Methods of `DiffusionPipeline` that say where the weights of its components rest."""

    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        raise NotImplementedError

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Load the weights leaf by leaf as they are called: the least memory, and the slowest.

        Computes on CUDA device `gpu_id`, or on `device`; where there is no GPU, on the CPU, with the weights resting
        on disk in their checkpoint. Raises `ValueError` for a device that is not there.
        """
        chosen = execution_device(device, gpu_id)
        self._offload(sequential_rule(chosen), chosen)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Have one whole component on the device at a time, for as long as it is in use: little time, some memory.

        The device is chosen as for `enable_sequential_cpu_offload`.
        """
        chosen = execution_device(device, gpu_id)
        self._offload(model_rule(chosen), chosen)

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
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        unknown = sorted(set(excluded) - set(self.modules()))
        if unknown:
            raise ValueError(f"exclude_modules={unknown} are no components; there are {', '.join(self.modules())}.")
        device, rule = group_rule(
            onload_device,
            offload_device,
            offload_type,
            num_blocks_per_group,
            non_blocking,
            use_stream,
            record_stream,
            low_cpu_mem_usage,
            offload_to_disk_path,
        )
        self._offload(rule, device, excluded)

    def disable_sequential_cpu_offload(self) -> None:
        """Undo any offload of the components: their weights are where they were before."""
        for module in self.modules().values():
            detach(module)

    disable_model_cpu_offload = disable_sequential_cpu_offload
    disable_group_offload = disable_sequential_cpu_offload

    def _offload(self, rule: Rule, device: torch.device, excluded: Sequence[str] = ()) -> None:
        modules = self.modules()
        attach_all({name: module for name, module in modules.items() if name not in excluded}, rule, device)
        for name in excluded:
            detach(modules[name])
            modules[name].to(device)
