"""Results of elementwise operators on meta are laid out as on the device, also where a dimension has size 1."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from tests.memory_peaks import peak_bytes
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.prediction.component import trace_call
from lowtide.prediction.operators import made_by

AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL

SHAPES = [
    (1, 64, 8, 8),
    (2, 1, 8, 8),
    (1, 16, 1, 8),
    (1, 1, 4, 6),
    (2, 3, 4, 5),
    (1, 8, 3, 4, 4),
    (1, 1, 6),
    (1, 12, 6),
]
OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "divided by a number": lambda x, _: x / 1.5,
    "less a number": lambda x, _: x - 1,
    "times a scalar tensor": lambda x, _: x * torch.tensor(2.0),
    "sum": lambda x, y: x + y,
    "sum turned around": lambda x, y: y + x,
    "product with channels": lambda x, y: x * y.amax(dim=(0, *range(2, y.ndim)), keepdim=True),
    "silu": lambda x, _: torch.nn.functional.silu(x),
    "gelu": lambda x, _: torch.nn.functional.gelu(x),
    "clamp": lambda x, _: x.clamp(-1, 1),
    "square": lambda x, _: x**2,
    "where": lambda x, y: torch.where(x > 0, x, y),
    "compared": lambda x, y: x > y,
    "converted": lambda x, _: (x + 1).double() * 2,
    "in place": lambda x, y: (x.clone() + 0).add_(y),
}


class AsOnTheDevice(TorchDispatchMode):
    """What the predictor makes of operators on meta."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not any(tensor.is_meta for tensor in given):
            return func(*args, **(kwargs or {}))
        return made_by(func, args, kwargs or {})


def layouts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of a shape in every order of their dimensions, one as it comes from attention, and one with gaps."""
    made = []
    for order in itertools.islice(itertools.permutations(range(len(shape))), 24):
        turned = torch.randn([shape[dim] for dim in order])
        made.append(turned.permute([order.index(dim) for dim in range(len(shape))]))
    if len(shape) == 4:
        batch, channels, height, width = shape
        made.append(torch.randn(batch, height * width, channels).transpose(-1, -2).reshape(shape))
        made.append(torch.randn(batch, channels, height, 2 * width)[..., ::2])
    return made


@pytest.mark.parametrize("name", OPERATORS)
def test_strides_on_meta_are_those_of_kernels(name: str) -> None:
    differed = 0
    for shape in SHAPES:
        tensors = layouts(shape)
        for x, y in zip(tensors, [*tensors[1:], tensors[0]], strict=True):
            for other in (x, y):
                expected = OPERATORS[name](x, other)
                on_meta = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in (x, other)]
                differed += OPERATORS[name](*on_meta).stride() != expected.stride()
                with AsOnTheDevice():
                    result = OPERATORS[name](*on_meta)
                assert result.stride() == expected.stride(), (shape, x.stride(), other.stride())
    if name == "divided by a number":
        assert differed > 0, "PyTorch lays them out alike now: elementwise.py is no longer needed"


def test_the_peak_of_the_peers_autoencoder() -> None:
    """Its attention divides by 1.0, after which a map was taken for one with its channels last."""
    torch.manual_seed(0)
    config = {"block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**config, **kinds).eval().requires_grad_(False)
    for layout in (torch.contiguous_format, torch.channels_last):
        latents = torch.randn(1, 4, 48, 48).contiguous(memory_format=layout)
        with torch.no_grad():
            measured = peak_bytes(lambda: vae.decode(latents)) + latents.nbytes  # noqa: B023
        copied = copy.deepcopy(vae).to("meta")
        on_meta = latents.to("meta")
        predicted = trace_call(lambda: copied.decode(on_meta), [copied], [on_meta])  # noqa: B023
        assert measured - 64 <= predicted.peak <= 1.02 * measured, layout
