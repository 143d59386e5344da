"""The base of the models: loading and saving, offload and casting, and the dtype and device they compute in."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lowtide.casting.apply_casting import named_casting
from lowtide.casting.casting import NEVER_CAST, Casting
from lowtide.configs import Config, read_json, write_json
from lowtide.hooks import (
    apply_group_offloading,
    apply_layerwise_casting,
    disable_group_offloading,
    disable_layerwise_casting,
)
from lowtide.hub import Source, weight_patterns
from lowtide.models.attention_backends import set_attention_backend, set_attention_slicing, xformers_or_sdpa
from lowtide.models.bounded_build import build_on_meta
from lowtide.models.load_arguments import check_not_pickled, chosen_dtype, mapped_device
from lowtide.models.put_weights import Offload, offload_named, put_weights, resting_state
from lowtide.peer_names import PeerNames, refuse_arguments
from lowtide.weights.fill import state_names
from lowtide.weights.index import CheckpointIndex, find_weights
from lowtide.weights.names import NameTable, apply_names
from lowtide.weights.provenance import keeping_origins
from lowtide.weights.save import atomic_folder, save_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model"
PEER_VERSION = "0.42.1"
"""The version of diffusers whose layout we write, for the entry `_diffusers_version`."""


class ModelMixin(PeerNames, nn.Module):
    """Base of the models: a configuration, loading and saving, dtype and device."""

    config_class: ClassVar[type[Config]]
    library: ClassVar[str] = "diffusers"
    """The library under whose name checkpoints list the class."""
    weights_name: ClassVar[str] = WEIGHTS_NAME
    names: ClassVar[NameTable] = NameTable()
    never_cast: ClassVar[tuple[str, ...]] = ()
    """Patterns of the names of modules that are not cast, besides `lowtide.casting.casting.NEVER_CAST`."""
    float32_beside_float16: ClassVar[tuple[str, ...]] = ()
    """Patterns of weights that overflow in float16: they are float32 where the others are float16.

    Where they rest in 8 bits, they compute in float32. This holds while loading: a later `.to(torch.float16)` makes
    them float16 as well, as it does in other libraries.
    """
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: Config | Mapping[str, Any], **entries: Any) -> Self:
        """Build with fresh random weights from a configuration or the contents of a `config.json`.

        Other `entries` by name replace those of `config`.
        """
        if isinstance(config, cls.config_class) and not entries:
            return cls(config)
        source = config.to_dict() if isinstance(config, Config) else config
        return cls(cls.config_class.from_dict({**source, **entries}))

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = True,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        offload: str | None = None,
        offload_device: torch.device | str | None = None,
        casting: Casting | str | None = None,
        low_cpu_mem_usage: bool | None = True,
        device_map: str | torch.device | None = None,
        **others: Any,
    ) -> Self:
        """Load from a folder or a Hub id: a `config.json` and safetensors weights, in `subfolder` if given.

        `dtype` (or `torch_dtype`, the older name) is the dtype to compute in, float32 if None, the file's own if
        "auto". Where it is the file's, the weights are views of the mapped file, not copies of it.
        With `offload` ("model", "block", "leaf" or "sequential") no weights are read now: they rest where they are, and
        come to `offload_device` (a GPU if there is one, else the CPU) when they are called. With `casting` ("fp8",
        "int8", "int4" or a `lowtide.Casting`) they rest in so few bits, cast one by one as they are read. A checkpoint
        that was saved so is loaded so. `device_map` ("cuda", "cpu", "balanced") moves the model there once it is
        loaded; `low_cpu_mem_usage` has no effect: it is always loaded in little memory.
        Raises `FileNotFoundError` for a missing model or variant, `CheckpointError` for files that are malformed or do
        not match the model, `ValueError` for configurations that are not supported.
        """
        check_not_pickled(use_safetensors)
        refuse_arguments(f"{cls.__name__}.from_pretrained", others)
        target = mapped_device(device_map, offload=offload)
        source = Source(os.fspath(pretrained), revision, _path(cache_dir), token, local_files_only, force_download)
        prefix = f"{subfolder}/" if subfolder else ""
        folder = source.fetch(prefix + name for name in [CONFIG_NAME, *weight_patterns(cls.weights_name, variant)])
        model = cls.from_folder(
            folder / (subfolder or ""),
            dtype=chosen_dtype(torch_dtype, dtype),
            variant=variant,
            offload=offload_named(offload, offload_device),
            casting=named_casting(casting),
        )
        return model if target is None else model.to(target)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None,
        variant: str | None = None,
        offload: Offload | None = None,
        casting: Casting | None = None,
        weights: CheckpointIndex | None = None,
    ) -> Self:
        """Load from a local folder, or with its configuration from `weights` that are elsewhere.

        `dtype` None keeps the file's. Raises as `from_pretrained`.
        """
        config = cls.read_config(folder)
        weights = find_weights(folder, cls.weights_name, variant) if weights is None else weights
        model = cls.on_meta(folder, config, weights)
        index = apply_names(weights, cls.names, state_names(model))
        put_weights(
            model,
            index,
            dtype=dtype,
            offload=offload,
            casting=casting,
            never_cast=cls.never_cast,
            float32_beside_float16=cls.float32_beside_float16,
        )
        return model.eval()

    @classmethod
    def read_config(cls, folder: Path) -> Config:
        """The configuration in a folder. Raises as `from_pretrained`."""
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}, so it is not a {cls.__name__} checkpoint.")
        saved_as = read_json(folder / CONFIG_NAME).get("_class_name", cls.__name__)
        if saved_as != cls.__name__:
            raise ValueError(f"{folder} holds a {saved_as!s:.80}, not a {cls.__name__}: load it with that class.")
        return cls.config_class.from_file(folder / CONFIG_NAME)

    @classmethod
    def on_meta(cls, folder: Path, config: Config, weights: CheckpointIndex | None) -> Self:
        """The model that the configuration in a folder describes, on meta, no larger than its `weights`."""
        return build_on_meta(lambda: cls(config), folder / CONFIG_NAME, config.to_dict(), weights)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_origins(fn), recurse)

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write `config.json` and the weights, all or nothing: a killed save leaves what was there before.

        Weights that rest in 8 bits are written so, each with its scale as `NAME_scale`; in 4 bits scales are among
        them.
        """
        with atomic_folder(Path(folder)) as target:
            self.write_to(target, variant=variant, max_shard_size=max_shard_size)

    def write_to(self, folder: Path, *, variant: str | None, max_shard_size: int | str | None) -> None:
        """Write the files of `save_pretrained` straight into an existing folder."""
        own = {"_class_name": type(self).__name__, "_diffusers_version": PEER_VERSION}
        write_json(folder / CONFIG_NAME, {**self.config.to_dict(), **own})
        save_tensors(resting_state(self), folder, self.weights_name, variant=variant, max_shard_size=max_shard_size)

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
        block_modules: Collection[str] | None = None,
        exclude_kwargs: Collection[str] | None = None,
    ) -> None:
        """Bring the weights to `onload_device` group by group; see `lowtide.hooks.apply_group_offloading`."""
        apply_group_offloading(
            self,
            onload_device,
            offload_device,
            offload_type,
            num_blocks_per_group,
            non_blocking,
            use_stream,
            record_stream,
            low_cpu_mem_usage,
            offload_to_disk_path,
            block_modules,
            exclude_kwargs,
        )

    def disable_group_offload(self) -> None:
        """Undo `enable_group_offload`, or any other offload of this model: the weights are where they were before."""
        disable_group_offloading(self)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: str | Collection[str] | None = None,
        skip_modules_classes: Collection[type[nn.Module]] | None = None,
        non_blocking: bool = False,
        *,
        scaled: bool = False,
        fp8_matmul: bool = False,
    ) -> None:
        """Let the weights rest in 8 or 4 bits; see `lowtide.hooks.apply_layerwise_casting`.

        `compute_dtype` is the model's dtype if None. The model's own patterns of modules that are never cast are added
        to `skip_modules_pattern`, which is `NEVER_CAST` if None.
        """
        asked = NEVER_CAST if skip_modules_pattern in (None, "auto") else skip_modules_pattern
        patterns = (asked,) if isinstance(asked, str) else tuple(asked or ())
        apply_layerwise_casting(
            self,
            storage_dtype,
            compute_dtype or self.dtype,
            (*patterns, *self.never_cast),
            skip_modules_classes,
            non_blocking,
            scaled=scaled,
            fp8_matmul=fp8_matmul,
        )

    def disable_layerwise_casting(self) -> None:
        """Undo `enable_layerwise_casting`; see `lowtide.hooks.disable_layerwise_casting`."""
        disable_layerwise_casting(self)

    def set_attention_backend(
        self, backend: str, *, chunk_bytes: int | str | None = None, attention_op: Any = None
    ) -> None:
        """Have all attention computed by "sdpa" (the default), "flash", "efficient", "cudnn", "xformers", "chunked" or
        "math"; see `lowtide.ops.attention.AttentionBackend`. Raises `ValueError`, listing what this device has.
        """
        set_attention_backend([self], backend, chunk_bytes=chunk_bytes, op=attention_op)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Compute attention with xFormers; without it, PyTorch's own memory-efficient kernels are used, with a note."""
        xformers_or_sdpa([self], attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Let PyTorch choose the kernel of attention again."""
        set_attention_backend([self], "sdpa")

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention for some heads at a time: half of them ("auto"), one ("max"), a number, or all (None)."""
        set_attention_slicing([self], slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention for all heads at once."""
        set_attention_slicing([self], None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device the model computes on."""
        return next(self.parameters()).device


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)
