"""Other libraries that offload a network's weights, each put on a plain module as its own documentation says.

All of them serve the very network that Lowtide's rows stream, so that both compute the same; but for those that copy
what blocks are given, which breaks U-Nets of ours: they serve that of diffusers, of the same shapes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Put = Callable[[nn.Module, torch.device], None]


@dataclass(frozen=True)
class Peer:
    """`put` offloads a module that is on the host. With `streams` its weights come anew in every step.

    With `copies_lists`, blocks get copies of the lists that they are given; our U-Net's take skips away from one.
    """

    needs: tuple[str, ...]
    put: Put
    streams: bool = True
    copies_lists: bool = False

    @property
    def missing(self) -> list[str]:
        """Of the packages it needs, those that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def group_offload(level: str) -> Put:
    """Of diffusers, with a stream and `record_stream`: its fastest. It refuses streams on a CPU."""

    def put(module: nn.Module, device: torch.device) -> None:
        from diffusers.hooks import apply_group_offloading

        has_streams = device.type != "cpu"
        streams = dict.fromkeys(("use_stream", "record_stream", "non_blocking"), has_streams)
        groups = {"num_blocks_per_group": 1} if level == "block_level" else {}
        apply_group_offloading(module, device, torch.device("cpu"), offload_type=level, **groups, **streams)

    return put


def model_offload(module: nn.Module, device: torch.device) -> None:
    """What `enable_model_cpu_offload` does with each network: it comes whole, and stays until another one comes."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(module, device)


def cache_dit(names: tuple[str, ...]) -> Put:
    """Its offload of layers, or of the blocks in lists of these names, with copies of their own streams."""

    def put(module: nn.Module, device: torch.device) -> None:
        from cache_dit.offload import layerwise_cpu_offload

        blocks = [f"{name}.{index}" for name in names for index, _ in enumerate(getattr(module, name))]
        copies = {"non_blocking": True, "async_transfer": True, "prefetch_limit": True}
        layerwise_cpu_offload(module, module_names=blocks or None, onload_device=device, **copies)
        for name, child in module.named_children():
            if blocks and name not in names:
                child.to(device)

    return put


def managed(module: nn.Module, device: torch.device) -> None:
    """The offload of groups by diffusers-mm, with host memory pinned beforehand."""
    from diffusers_mm import ModelManager

    manager = ModelManager(strategy="group_offload", group_offload_low_cpu_mem=False)
    manager.register_component("transformer", module)
    manager.apply_offload_strategy(device)


FLUX_BLOCKS = ("transformer_blocks", "single_transformer_blocks")
PEERS = {
    "diffusers block": Peer(("diffusers",), group_offload("block_level"), copies_lists=True),
    "diffusers leaf": Peer(("diffusers",), group_offload("leaf_level")),
    "model offload": Peer(("accelerate",), model_offload, streams=False),
    "cache-dit layers": Peer(("cache_dit", "diffusers"), cache_dit(())),
    "cache-dit blocks": Peer(("cache_dit", "diffusers"), cache_dit(FLUX_BLOCKS)),
    "diffusers-mm": Peer(("diffusers_mm", "diffusers", "accelerate"), managed),
}
