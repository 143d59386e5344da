"""Networks to stream through an accelerator: published shapes, random numbers as weights, filled cheaply anywhere.

Speed and memory do not depend on the values of weights, as long as they are random: a device multiplies zeros faster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""Of Stable Diffusion XL, as published."""
NOISE = 2**22
"""Numbers that are drawn; weights are filled with them over and over."""


@dataclass(frozen=True)
class Network:
    """What `build` makes (on the CPU, in the default dtype), and the `inputs` of a step on a device, in a dtype.

    `theirs` makes the same network of diffusers, where it has one.
    """

    about: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.device, torch.dtype], dict[str, Any]]
    theirs: Callable[[], nn.Module] | None = None


# ---- the shape of FLUX: tokens `B N W`, heads `B H N D`


class Side(nn.Module):
    """The layers of the image's tokens, or of the text's, in a block of two streams."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class TwoStreams(nn.Module):
    """A block in which image and text have layers of their own, and attend to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image, self.text = Side(width, heads), Side(width, heads)

    def forward(self, image: torch.Tensor, text: torch.Tensor, given: torch.Tensor, turn: torch.Tensor) -> Any:
        """Both streams, changed."""
        sides = [(self.text, text), (self.image, image)]
        parts = [side.modulation(F.silu(given))[:, None].chunk(6, dim=-1) for side, _ in sides]
        normed = [modulated(x, part[0], part[1]) for (_, x), part in zip(sides, parts, strict=True)]
        qkv = [projected(side, x, self.heads) for (side, _), x in zip(sides, normed, strict=True)]
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*qkv, strict=True))
        attended = attention(q, k, v, turn).split([text.shape[1], image.shape[1]], dim=1)
        done = []
        for (side, x), part, seen in zip(sides, parts, attended, strict=True):
            middle = x + part[2] * side.out(seen)
            inner = side.up(modulated(middle, part[3], part[4]))
            done.append(middle + part[5] * side.down(F.gelu(inner, approximate="tanh")))
        return done[1], done[0]


class OneStream(nn.Module):
    """A block in which all tokens have the same layers, attention and products side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 4 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.out = nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor, given: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        """The tokens, changed."""
        shift, scale, gate = self.modulation(F.silu(given))[:, None].chunk(3, dim=-1)
        normed = modulated(x, shift, scale)
        seen = attention(*projected(self, normed, self.heads), turn)
        return x + gate * self.out(torch.cat([seen, F.gelu(self.up(normed), approximate="tanh")], dim=-1))


class FluxShaped(nn.Module):
    """A transformer with the layers and sizes of FLUX.1 (12 billion parameters); without `width` and so on, its own."""

    def __init__(
        self, width: int = 3072, heads: int = 24, two: int = 19, one: int = 38, channels: int = 64, words: int = 4096
    ) -> None:
        super().__init__()
        self.x_in, self.words_in = nn.Linear(channels, width), nn.Linear(words, width)
        self.time_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.guidance_in = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled_in = nn.Sequential(nn.Linear(768, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer_blocks = nn.ModuleList(TwoStreams(width, heads) for _ in range(two))
        self.single_transformer_blocks = nn.ModuleList(OneStream(width, heads) for _ in range(one))
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, channels)

    def forward(
        self, x: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor, time: torch.Tensor, turn: torch.Tensor
    ) -> torch.Tensor:
        """Tokens `B N C` of the image; `turn` are cosines and sines `[2, tokens, head]`."""
        given = self.time_in(time) + self.guidance_in(time) + self.pooled_in(pooled)
        image, text = self.x_in(x), self.words_in(words)
        for block in self.transformer_blocks:
            image, text = block(image, text, given, turn)
        both = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            both = block(both, given, turn)
        shift, scale = self.modulation(F.silu(given))[:, None].chunk(2, dim=-1)
        return self.out(modulated(both[:, text.shape[1] :], shift, scale))


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def projected(layers: Any, x: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = layers.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return layers.norm_q(q), layers.norm_k(k), v


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    out = F.scaled_dot_product_attention(turned(q, turn), turned(k, turn), v)
    return out.transpose(1, 2).flatten(2)


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


# ---- what there is


def unet(**entries: Any) -> nn.Module:
    """Lowtide's U-Net; without entries, nearly that of Stable Diffusion 1.5."""
    from lowtide.models.unet import UNet2DConditionModel

    return UNet2DConditionModel.from_config(entries)


def their_unet(**entries: Any) -> nn.Module:
    """That of diffusers; what is not told is the same as in ours."""
    import diffusers

    return diffusers.UNet2DConditionModel(**entries)


def with_unets(about: str, inputs: Callable[[torch.device, torch.dtype], dict[str, Any]], **entries: Any) -> Network:
    """Both U-Nets of these entries."""
    return Network(about, lambda: unet(**entries), inputs, lambda: their_unet(**entries))


def of_unet(side: int, words: int, *, pooled: int = 0) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """The inputs of a step with guidance: two pictures, latents of `side`, 77 tokens of `words` numbers."""

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        some = numbers(device, dtype)
        given: dict[str, Any] = {"sample": some(2, 4, side, side), "timestep": torch.tensor(500, device=device)}
        given["encoder_hidden_states"] = some(2, 77, words)
        if pooled:
            given["added_cond_kwargs"] = {"text_embeds": some(2, pooled), "time_ids": some(2, 6)}
        return given

    return inputs


def of_flux(
    tokens: int, text: int, head: int, channels: int = 64, words: int = 4096
) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """The inputs of a step: one picture of so many tokens, and a text."""

    def inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        some = numbers(device, dtype)
        given = {"x": some(1, tokens, channels), "words": some(1, text, words), "pooled": some(1, 768)}
        return {**given, "time": some(1, 256), "turn": some(2, tokens + text, head).clamp_(-1, 1)}

    return inputs


def numbers(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)


SMALL = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 24}
SMALL_SDXL = {
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 2],
    "projection_class_embeddings_input_dim": 6 * 256 + 8,
}
TRUE = {
    "sd15": with_unets("U-Net of Stable Diffusion 1.5, 512x512", of_unet(64, 768), cross_attention_dim=768),
    "sdxl": with_unets("U-Net of SDXL, 1024x1024", of_unet(128, 2048, pooled=1280), **SDXL_UNET),
    "flux": Network("transformer shaped as FLUX.1, 1024x1024", FluxShaped, of_flux(4096, 512, 128)),
}
TINY = {
    "sd15": with_unets("tiny U-Net", of_unet(8, 24), block_out_channels=(8, 16, 16, 16), attention_head_dim=2, **SMALL),
    "sdxl": with_unets(
        "tiny U-Net with added conditions", of_unet(8, 24, pooled=8), **{**SDXL_UNET, **SMALL, **SMALL_SDXL}
    ),
    "flux": Network(
        "tiny transformer", lambda: FluxShaped(32, 2, two=2, one=3, words=16), of_flux(16, 8, 16, words=16)
    ),
}


# ---- weights


def built(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """What `build` makes, a network or a pipeline, on a device and with random weights of a dtype.

    No weight is made twice, or in another dtype first. Weights are such that activations stay near one.
    """
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with without_initialising(), device:
            made = build()
    finally:
        torch.set_default_dtype(default)
    for network in networks_of(made):
        network.eval().requires_grad_(False)
        fill(network)
    return made


def networks_of(made: Any) -> list[nn.Module]:
    """The networks of a pipeline, or the one network."""
    if isinstance(made, nn.Module):
        return [made]
    return [part for part in made.components.values() if isinstance(part, nn.Module)]


def fill(network: nn.Module) -> None:
    """Random numbers for matrices, so that a product keeps the size of its input; ones for norms, zeros for biases."""
    scaled: dict[Any, torch.Tensor] = {}
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            key = (weight.device, weight.dtype, weight[0].numel())
            if key not in scaled:
                scaled[key] = (noise() / weight[0].numel() ** 0.5).to(weight.dtype).to(weight.device)
            for piece in pieces(weight, len(scaled[key])):
                piece.copy_(scaled[key][: piece.numel()].view_as(piece))


def pieces(weight: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """A weight, or rows of it, so that none has more than `most` numbers."""
    step = max(1, most // max(1, weight[0].numel()))
    yield from weight.split(step) if weight.numel() > most else (weight,)


_NOISE: list[torch.Tensor] = []


def noise() -> torch.Tensor:
    if not _NOISE:
        _NOISE.append(torch.randn(NOISE, generator=torch.Generator().manual_seed(0)))
    return _NOISE[0]


FILLED = ("uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "kaiming_uniform_",
    "kaiming_normal_", "xavier_uniform_", "xavier_normal_")  # fmt: skip


@contextmanager
def without_initialising() -> Generator[None]:
    """Have modules leave their new weights as the memory is: drawing 12 billion numbers by each layer takes minutes."""
    before = {name: getattr(nn.init, name) for name in FILLED}
    try:
        for name in FILLED:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)
