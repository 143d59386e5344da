"""Modules and rules that the tests of the engine share: every preset, and modules of every kind that it must serve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tests import tiny
from torch import nn

from lowtide.memory.attach import Attachment, attach
from lowtide.memory.placeholder import AtRest
from lowtide.memory.rule import Level, Rule, Tier
from lowtide.memory.stream import Stream
from lowtide.models.t5 import T5EncoderModel

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block; `tied` is a weight that it shares with others."""

    def __init__(self, width: int, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        if tied is not None:
            self.down.weight = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Toy(nn.Module):
    """Ties across blocks and with an embedding, buffers of all kinds, parameters around others, a shared module."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        tied = nn.Parameter(torch.randn(width, 2 * width) / 6)
        self.blocks = nn.ModuleList([Block(width, tied if n in (1, 3) else None) for n in range(5)])
        self.blocks.append(self.blocks[0])
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.recurrent = nn.LSTM(width, width, batch_first=True)
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("offset", torch.randn(width))
        self.register_buffer("table", torch.randn(4, width), persistent=False)
        self.register_buffer("calls", torch.zeros(1))
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + self.offset + self.table[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.recurrent(x)[0])


@dataclass(frozen=True)
class Case:
    """A module ready to compute, and a call of it that gives one tensor."""

    module: nn.Module
    call: Callable[[nn.Module], torch.Tensor]

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.call(self.module)


def toy(dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (2, 4))
    return Case(Toy().to(dtype).eval(), lambda module: module(ids))


def unet(dtype: torch.dtype) -> Case:
    inputs = _as(tiny.unet_inputs(), dtype)
    return Case(tiny.unet(**tiny.FEW_BLOCKS).to(dtype), lambda module: module(**inputs).sample)


def vae(dtype: torch.dtype) -> Case:
    pixels, latents = tiny.numbers((1, 3, 16, 16)).to(dtype), tiny.numbers((1, 4, 4, 4)).to(dtype)

    def call(module: Any) -> torch.Tensor:
        return module.decode(latents).sample + module.encode(pixels).latent_dist.mean.mean()

    return Case(tiny.vae().to(dtype), call)


def video(dtype: torch.dtype) -> Case:
    inputs = _as(tiny.video_inputs(), dtype)
    return Case(tiny.video_transformer().to(dtype), lambda module: module(**inputs).sample)


def clip(dtype: torch.dtype) -> Case:
    ids = torch.arange(16)[None]
    return Case(tiny.text_encoder().to(dtype), lambda module: module(ids).last_hidden_state)


def t5(dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    model = T5EncoderModel.from_config({**sizes, "feed_forward_proj": "gated-gelu"})
    ids = torch.arange(7)[None]
    return Case(model.to(dtype).eval(), lambda module: module(ids).last_hidden_state)


def peer_unet(dtype: torch.dtype) -> Case:
    import diffusers

    inputs = _as(tiny.unet_inputs(), dtype)
    module = tiny.set_weights(diffusers.UNet2DConditionModel(**{**tiny.UNETS["sd1"], **tiny.FEW_BLOCKS}))
    return Case(module.to(dtype), lambda module: module(**inputs).sample)


def peer_vae(dtype: torch.dtype) -> Case:
    import diffusers

    latents = tiny.numbers((1, 4, 4, 4)).to(dtype)
    module = tiny.set_weights(diffusers.AutoencoderKL(**tiny.VAE))
    return Case(module.to(dtype), lambda module: module.decode(latents).sample)


def peer_transformer(dtype: torch.dtype) -> Case:
    import diffusers

    torch.manual_seed(0)
    module = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=3, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=6,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": tiny.numbers((1, 2, 4, 8, 8)).to(dtype),
        "encoder_hidden_states": tiny.numbers((1, 6, 16)).to(dtype),
        "timestep": torch.tensor([5]),
    }
    return Case(module.to(dtype), lambda module: module(**inputs).sample)


CASES = {
    "toy": toy,
    "unet": unet,
    "vae": vae,
    "video": video,
    "clip": clip,
    "t5": t5,
    "peer unet": peer_unet,
    "peer vae": peer_vae,
    "peer transformer": peer_transformer,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RULES: dict[str, Rule] = {
    "sequential": Rule(Level.LEAF, Tier.DISK, prefetch=0, spill=True),
    "model": Rule(Level.WHOLE, Tier.DISK, prefetch=0, spill=True),
    "blocks": Rule(Level.BLOCK, Tier.DISK, prefetch=0, spill=True),
    "blocks ahead": Rule(Level.BLOCK, Tier.DISK, spill=True),
    "pairs of blocks ahead": Rule(Level.BLOCK, Tier.DISK, blocks_per_group=2, spill=True),
    "leaves ahead": Rule(Level.LEAF, Tier.DISK, spill=True),
    "leaves three ahead": Rule(Level.LEAF, Tier.DISK, prefetch=3, spill=True),
    "blocks ahead by bytes": Rule(Level.BLOCK, Tier.DISK, prefetch_bytes=30_000, spill=True),
    "blocks on the host": Rule(Level.BLOCK, Tier.HOST),
    "half on the host": Rule(Level.BLOCK, Tier.HOST, host_bytes=5000),
}


@functools.cache
def plain(name: str, dtype: str) -> torch.Tensor:
    """What the case gives without a rule."""
    return CASES[name](DTYPES[dtype]).run()


def total(module: nn.Module) -> int:
    """Bytes of a module's tensors, tied ones once."""
    found = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.itemsize for t in found.values())


def put(module: nn.Module, rule: Rule, *, zero_copy: bool = True) -> Attachment:
    """Attach a rule; without `zero_copy` everything goes through the ring, as it does for an accelerator."""
    return attach(module, rule, stream(rule, zero_copy=zero_copy))


def stream(rule: Rule, *, zero_copy: bool = True) -> Stream:
    return Stream(CPU, prefetch=rule.prefetch, prefetch_bytes=rule.prefetch_bytes, zero_copy=zero_copy)


def all_at_rest(attachment: Attachment) -> bool:
    """Whether every weight but those that stay is at rest."""
    streamed = [unit for unit in attachment.units if not unit.stays]
    return all(
        unit.count == 0 and unit.load is None and isinstance(view.slot.now(), AtRest)
        for unit in streamed
        for weight in unit.weights
        for view in weight.views
    )


def own_bound(attachment: Attachment) -> int:
    """The most that may be on the device, from the sizes of the tensors alone: computed apart from the engine."""
    align = lambda nbytes: -(-nbytes // 256) * 256  # noqa: E731
    sizes = {unit: sum(align(weight.nbytes) for weight in unit.weights) for unit in attachment.units}
    stay = sum(size for unit, size in sizes.items() if unit.stays)
    aside = sum(size for unit, size in sizes.items() if unit.aside and not unit.stays)
    streamed = [size for unit, size in sizes.items() if not unit.stays and not unit.aside]
    largest, rule = max(streamed, default=0), attachment.rule
    groups = any(len(unit.modules) > 1 for unit in attachment.units if not unit.stays and not unit.aside)
    if rule.prefetch_bytes is not None:
        # once for buffers and once for windows, as units may have both
        return stay + aside + 2 * min(max(rule.prefetch_bytes, largest), sum(streamed)) + groups * largest
    return stay + aside + (rule.prefetch + 1 + groups) * largest


def _as(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
