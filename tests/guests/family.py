"""A guest: a tiny pipeline of another library with random weights, one short call of it, and what the call gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PROMPT = "a red boat on the sea at night"


def pictures_of(output: Any) -> Tensor:
    """The pictures or frames of a call's output, as one tensor."""
    for name in ("images", "frames", "prediction"):
        if hasattr(output, name):
            return stacked(getattr(output, name))
    raise ValueError(f"{type(output).__name__} has neither images, nor frames, nor a prediction.")


def stacked(values: Any) -> Tensor:
    """Tensors, arrays, or lists of lists of them, as one tensor."""
    if isinstance(values, list | tuple):
        return torch.stack([stacked(value) for value in values])
    return torch.as_tensor(np.asarray(values)) if not isinstance(values, Tensor) else values


@dataclass(frozen=True)
class Family:
    """A pipeline with the arguments of one short call.

    `blocks` names the lists of repeated blocks in the networks that run in every step, as in "unet.down_blocks".
    `not_saved` says why `save_pretrained` and `from_pretrained` do not give the same pipeline, where that is so.
    """

    pipeline: Any
    call: dict[str, Any]
    blocks: tuple[str, ...]
    result: Callable[[Any], Tensor] = pictures_of
    not_saved: str = ""

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The components that `blocks` are in."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.blocks))

    def repeated(self) -> list[nn.Module]:
        """Every repeated block, in the order of the lists."""
        paths = [name.partition(".") for name in self.blocks]
        return [block for part, _, path in paths for block in getattr(self.pipeline, part).get_submodule(path)]


def family(pipeline: Any, call: dict[str, Any], *blocks: str, **about: Any) -> Family:
    """A `Family` whose pipeline is ready to compute and shows no progress."""
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline).values():
        module.eval().requires_grad_(False)
    return Family(pipeline, call, blocks, **about)


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks among a pipeline's components, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def saved_and_loaded(family: Family, folder: Path) -> Family:
    """The family with the pipeline that its own class reads from what it wrote to `folder`.

    The weights are copied to memory of their own afterwards. A file's mapping has tensors at any multiple of four
    bytes, and some of PyTorch's CPU kernels round otherwise there than at the multiples of 64 where tensors begin.
    They are not to be trained: a product with a weight that asks for gradients, and with states that have gaps, is
    another kernel's, also where none are computed.
    """
    family.pipeline.save_pretrained(str(folder))
    pipeline = type(family.pipeline).from_pretrained(folder)
    if hasattr(pipeline, "load_components"):  # of a modular pipeline, which reads the names of its components first
        pipeline.load_components()
    pipeline.set_progress_bar_config(disable=True)
    for module in modules_of(pipeline).values():
        module.requires_grad_(False)
        for weight in module.parameters():
            weight.data = weight.data.clone()
    return replace(family, pipeline=pipeline)


def run(family: Family, seed: int = 0) -> Tensor:
    """What one call of a family gives, with noise of a seed: equal seeds, equal bits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    return family.result(family.pipeline(**family.call, generator=generator))


def ready(module: nn.Module, seed: int = 0, gain: float = 1.0) -> Any:
    """The module with random float32 weights of a seed, ready to compute.

    Matrices and kernels get uniform numbers of variance `gain` over their fan-in, so that no part of a network is
    silent as published initializations leave some; norms get numbers around one, and biases small ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(_scaled(name, values, gain))
    return module.float().eval().requires_grad_(False)


def _scaled(name: str, values: Tensor, gain: float) -> Tensor:
    if values.ndim > 1:
        return values if "embedding.weight" in name else values * (3 * gain / values[0].numel()) ** 0.5
    return 1 + 0.3 * values if name.endswith("weight") else 0.2 * values


def unevenly(module: nn.Module) -> Any:
    """The module with other numbers in its saved buffers of zeros or of ones, so that a run shows where one is lost."""
    generator = torch.Generator().manual_seed(0)
    saved = module.state_dict().keys() - dict(module.named_parameters()).keys()
    for name in sorted(saved):
        buffer = module.get_buffer(name)
        if buffer.is_floating_point() and buffer.numel() > 1 and (buffer == buffer.flatten()[0]).all():
            buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
    return module


def picture(height: int, width: int, seed: int = 0) -> Any:
    """A PIL picture of smooth random colours, for calls that begin with one."""
    from PIL import Image

    coarse = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return Image.fromarray((255 * fine).permute(1, 2, 0).byte().numpy())
