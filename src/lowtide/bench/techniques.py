"""The techniques that `lowtide bench table` measures, each as the calls that apply it to a pipeline just loaded.

Our methods have the peer's names, so a function serves both libraries unless its docstring says otherwise. Each also
puts the weights where they belong: on the device, or, for an offload, where they rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from lowtide.bench.context import Context

OURS = "lowtide"
ORIGINAL = "original"


Apply = Callable[[Any, ModuleType, Context], None]


@dataclass(frozen=True)
class Technique:
    """One row: its name for `--rows`, its title, the precision that the model is loaded in, and what applies it.

    `apply` takes the pipeline, the library that it is from, and the context. `peer` is false if the peer lacks the
    technique.
    """

    name: str
    title: str
    precision: Literal["float32", "half"]
    apply: Apply
    peer: bool = True


def _resident(pipe: Any, library: ModuleType, context: Context) -> None:
    pipe.to(context.device)


def _channels_last(pipe: Any, library: ModuleType, context: Context) -> None:
    import torch

    pipe.to(context.device)
    pipe.unet.to(memory_format=torch.channels_last)


def _traced(pipe: Any, library: ModuleType, context: Context) -> None:
    from lowtide.bench.traced_unet import TracedUNet, example_inputs

    _channels_last(pipe, library, context)
    pipe.unet = TracedUNet(pipe.unet, example_inputs(pipe, context))


def _attention(pipe: Any, library: ModuleType, context: Context) -> None:
    """Set before the trace, because the attention of a traced network is fixed."""
    pipe.enable_xformers_memory_efficient_attention()
    _traced(pipe, library, context)


def _vae_sliced(pipe: Any, library: ModuleType, context: Context) -> None:
    """By the autoencoder's own method, since the peer's pipeline no longer has one."""
    pipe.to(context.device)
    pipe.vae.enable_slicing()


def _vae_tiled(pipe: Any, library: ModuleType, context: Context) -> None:
    pipe.to(context.device)
    pipe.vae.enable_tiling()


def _vae_exact(pipe: Any, library: ModuleType, context: Context) -> None:
    pipe.to(context.device)
    pipe.enable_vae_tiling("exact")


def _attention_sliced(pipe: Any, library: ModuleType, context: Context) -> None:
    pipe.to(context.device)
    pipe.enable_attention_slicing()


def _offloaded(method: str) -> Apply:
    """An offload of the whole pipeline; no device is named on a CPU, since the peer would then move nothing."""

    def apply(pipe: Any, library: ModuleType, context: Context) -> None:
        named = {} if context.device.type == "cpu" else {"device": context.device}
        getattr(pipe, method)(**named)

    return apply


def _grouped(kind: str, *, to_disk: bool = False) -> Apply:
    """Group offload with a stream."""

    def apply(pipe: Any, library: ModuleType, context: Context) -> None:
        options: dict[str, Any] = {"offload_type": f"{kind}_level"}
        if kind == "block":
            options["num_blocks_per_group"] = 1
        if context.device.type == "cpu" and library.__name__ != OURS:
            _group_on_disk(pipe, library, context, options)
            return
        if to_disk:
            options["offload_to_disk_path"] = context.folder
        pipe.enable_group_offload(context.device, use_stream=True, **options)

    return apply


def _group_on_disk(pipe: Any, library: ModuleType, context: Context, options: dict[str, Any]) -> None:
    """The peer's group offload on a CPU: only an offload to disk saves memory there, and it has no streams.

    Each network has a folder of its own, because the files of two networks would have the same names.
    """
    for name, module in _networks(pipe).items():
        folder = Path(context.folder) / name
        folder.mkdir()
        _hooks(library).apply_group_offloading(
            module, onload_device=context.device, offload_to_disk_path=str(folder), **options
        )


def _cast(storage: str, **options: Any) -> Apply:
    """Keep the U-Net's weights in fewer bits; the pipeline is moved first, because a move would end the casting."""

    def apply(pipe: Any, library: ModuleType, context: Context) -> None:
        import torch

        pipe.to(context.device)
        dtype = getattr(torch, storage)
        pipe.unet.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=context.dtype, **options)

    return apply


def _everywhere(storage: str) -> Apply:
    def apply(pipe: Any, library: ModuleType, context: Context) -> None:
        import torch

        pipe.to(context.device)
        for module in _networks(pipe).values():
            _hooks(library).apply_layerwise_casting(module, getattr(torch, storage), context.dtype)

    return apply


def _int8_grouped(pipe: Any, library: ModuleType, context: Context) -> None:
    import torch

    pipe.unet.enable_layerwise_casting(storage_dtype=torch.int8, compute_dtype=context.dtype)
    _grouped("block")(pipe, library, context)


def _networks(pipe: Any) -> dict[str, Any]:
    """The components that are networks, of either library's pipeline."""
    import torch

    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _hooks(library: ModuleType) -> Any:
    return importlib.import_module(f"{library.__name__}.hooks")


_ROWS = (
    Technique(ORIGINAL, "original", "float32", _resident),
    Technique("half", "half precision", "half", _resident),
    Technique("channels-last", "channels last", "half", _channels_last),
    Technique("traced", "traced UNet", "half", _traced),
    Technique("attention", "memory-efficient attention", "half", _attention),
    Technique("vae-slicing", "VAE slicing", "half", _vae_sliced),
    Technique("vae-tiling", "VAE tiling, blended", "half", _vae_tiled),
    Technique("vae-exact", "VAE by rows, exact", "half", _vae_exact, peer=False),
    Technique("attention-slicing", "attention slicing", "half", _attention_sliced),
    Technique("model-offload", "model offload", "half", _offloaded("enable_model_cpu_offload")),
    Technique("sequential-offload", "sequential offload", "half", _offloaded("enable_sequential_cpu_offload")),
    Technique("group-block", "group offload, blocks", "half", _grouped("block")),
    Technique("group-leaf", "group offload, leaves", "half", _grouped("leaf")),
    Technique("group-block-disk", "group offload, blocks on disk", "half", _grouped("block", to_disk=True)),
    Technique("fp8", "fp8 UNet", "half", _cast("float8_e4m3fn")),
    Technique("fp8-scaled", "fp8 UNet, scaled", "half", _cast("float8_e4m3fn", scaled=True), peer=False),
    Technique("int8", "int8 UNet", "half", _cast("int8"), peer=False),
    Technique("int8-all", "int8, every network", "half", _everywhere("int8"), peer=False),
    Technique("int4-all", "int4, every network", "half", _everywhere("int4"), peer=False),
    Technique("int8-group-block", "int8 UNet + group offload, blocks", "half", _int8_grouped, peer=False),
)
TECHNIQUES = {technique.name: technique for technique in _ROWS}
"""Every technique by its name. The first five build on each other; each of the others is on top of `half`."""
