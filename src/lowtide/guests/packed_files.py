"""A network whose weights are packed in a GGUF file: planned by their bytes, then computed with where they are.

Packed weights are unpacked whenever their layer computes, by diffusers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowtide.configs import CheckpointError
from lowtide.guests.conversions import NotInFileError, Tensors, conversions, lacking
from lowtide.guests.followed import Followed
from lowtide.weights.fill import state_names
from lowtide.weights.gguf import GgufIndex
from lowtide.weights.slots import slots

INSTALL = "pip install gguf accelerate"


@dataclass(frozen=True, eq=False)
class Packed:
    """What a file holds for a network, by its own names, on meta. It computes in `dtype`."""

    tensors: Mapping[str, torch.Tensor]
    followed: Followed
    quantizer: Any
    dtype: torch.dtype

    def read_into(self, network: nn.Module) -> None:
        """Give the network its weights: views of the file, and what is computed of several or of another dtype."""
        files: dict[Any, Any] = {}
        numbers = {name: self.followed.numbers(_plain(tensor), files) for name, tensor in self.tensors.items()}
        self._put(network, {name: _packed_as(self.tensors[name], value) for name, value in numbers.items()})

    def put_on_meta(self, network: nn.Module) -> None:
        """Give the network what has the sizes of its weights. Raises `CheckpointError` where they are others."""
        keep = type(network)._keep_in_fp32_modules or []  # type: ignore[attr-defined]
        self.quantizer.preprocess_model(
            model=network,
            device_map=None,
            state_dict=dict(self.tensors),
            keep_in_fp32_modules=[keep] if isinstance(keep, str) else list(keep),
        )
        self._put(network, self.tensors)
        network.hf_quantizer = self.quantizer

    def _put(self, network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        places = {slot.name: slot for slot in slots(network)}
        for name, tensor in tensors.items():
            slot = places[name]
            if _is_packed(tensor):
                self.quantizer.create_quantized_param(network, tensor, name, tensor.device)
                continue
            is_kept = not set(name.split(".")).isdisjoint(self.quantizer.keep_in_fp32_modules)
            value = tensor.to(torch.float32 if is_kept else self.dtype) if tensor.is_floating_point() else tensor
            slot.put(nn.Parameter(value, requires_grad=False) if slot.kind == "parameter" else value)


def packed(network: nn.Module, index: GgufIndex, dtype: torch.dtype) -> Packed:
    """What a file holds for a network on meta; nothing of it is read.

    Raises `ImportError` where gguf is not installed, `NotInFileError`, `NamesError` and `CheckpointError`.
    """
    if hasattr(network, "base_model_prefix"):
        raise CheckpointError(
            f"{index.files[0]}: a {type(network).__name__} is of transformers, and diffusers reads GGUF files for its "
            "own networks alone. Take a .safetensors file."
        )
    followed = Followed()
    quantizer = _quantizer(dtype)
    tensors = {name: _on_meta(followed, index, name) for name in index}
    result: Tensors = next(conversions(network, tensors, followed, alone=True), {})
    own = {name: tensor for name, tensor in result.items() if name in state_names(network)}
    if not own:
        raise NotInFileError(f"none of its weights is in {index.files[0]}")
    missing = lacking(network, own)
    if missing:
        raise CheckpointError(f"{index.files[0]}: {missing[0]} of its {type(network).__name__} is not there.")
    for slot in slots(network):
        if slot.name in own:
            _check_shape(slot.tensor, own[slot.name], f"{index.files[0]}: {slot.name}")
    return Packed(own, followed, quantizer, dtype)


def _quantizer(dtype: torch.dtype) -> Any:
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(f"Weights in GGUF files are read through gguf, which is not installed: {INSTALL}") from error
    config = importlib.import_module("diffusers").GGUFQuantizationConfig(compute_dtype=dtype)
    quantizer = importlib.import_module("diffusers.quantizers").DiffusersAutoQuantizer.from_config(config)
    quantizer.validate_environment()
    return quantizer


def _on_meta(followed: Followed, index: GgufIndex, name: str) -> torch.Tensor:
    tensor = followed.on_meta(index[name])
    if name not in index.kinds:
        return tensor
    kind = importlib.import_module("gguf").GGMLQuantizationType(index.kinds[name])
    return importlib.import_module("diffusers.quantizers.gguf.utils").GGUFParameter(tensor, quant_type=kind)


def _is_packed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "quant_type")


def _plain(tensor: Any) -> torch.Tensor:
    return tensor.as_tensor() if _is_packed(tensor) else tensor


def _packed_as(example: Any, numbers: torch.Tensor) -> torch.Tensor:
    return type(example)(numbers, quant_type=example.quant_type) if _is_packed(example) else numbers


def _check_shape(expected: torch.Tensor, found: Any, where: str) -> None:
    shape = found.quant_shape if _is_packed(found) else found.shape
    if tuple(shape) != tuple(expected.shape):
        raise CheckpointError(
            f"{where} has the shape {list(shape)}, and the configuration asks for {list(expected.shape)}. Check that "
            "both belong together."
        )
