"""What people do to a loaded pipeline of Stable Diffusion: each a function of it, with arguments of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tests.guests import families_unets as unets
from tests.guests import guest_parts as parts
from tests.guests.family import picture, ready

Change = tuple[Callable[[Any], object], Mapping[str, Any]]


def _numbers(*shape: int, seed: int = 5) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ip_adapter(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter with four tokens for each picture."""
    wide = unet.config.cross_attention_dim
    projection = {
        "proj.weight": _numbers(4 * wide, parts.WIDTH),
        "proj.bias": _numbers(4 * wide),
        "norm.weight": 1 + _numbers(wide),
        "norm.bias": _numbers(wide),
    }
    crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    widths = [unet.get_submodule(name.removesuffix(".processor")).to_k.out_features for name in crossing]
    keys = [f"{2 * at + 1}.to_{kind}_ip.weight" for at in range(len(crossing)) for kind in "kv"]
    values = [_numbers(width, wide, seed=at) for at, width in enumerate(width for width in widths for _ in "kv")]
    return {"image_proj": projection, "ip_adapter": dict(zip(keys, values, strict=True))}


def _load_ip_adapter(pipe: Any, *, encoder: bool) -> None:
    if encoder:
        pipe.register_modules(image_encoder=parts.clip_vision(), feature_extractor=parts.clip_pictures())
    folder = "image_encoder" if encoder else None
    pipe.load_ip_adapter(ip_adapter(pipe.unet), None, None, image_encoder_folder=folder)


def _ip_adapter(pipe: Any) -> None:
    _load_ip_adapter(pipe, encoder=True)
    pipe.set_ip_adapter_scale(0.7)


def _ip_adapter_and_none(pipe: Any) -> None:
    _load_ip_adapter(pipe, encoder=False)
    pipe.unload_ip_adapter()


def _textual_inversion(pipe: Any) -> None:
    pipe.load_textual_inversion(_numbers(2, parts.WIDTH), token="<boat>")


def _textual_inversion_and_none(pipe: Any) -> None:
    _textual_inversion(pipe)
    pipe.unload_textual_inversion()


def _scheduler(pipe: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)


def _processor(pipe: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe.unet.set_attn_processor(AttnProcessor())


def _fused_and_not(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


def _another_layer(pipe: Any) -> None:
    pipe.unet.conv_in = ready(torch.nn.Conv2d(4, 8, 3, padding=1), seed=8)


def _another_weight(pipe: Any) -> None:
    pipe.unet.conv_in.weight = torch.nn.Parameter(_numbers(*pipe.unet.conv_in.weight.shape), requires_grad=False)


def another_unet(layers: int = 1) -> Any:
    """A network of other weights."""
    return ready(unets.unet(layers_per_block=layers), seed=4)


EMBEDS = {"ip_adapter_image_embeds": [_numbers(2, 1, parts.WIDTH)]}
CHANGES: dict[str, Change] = {
    "IP-Adapter": (_ip_adapter, {"ip_adapter_image": picture(32, 32)}),
    "IP-Adapter of embeddings": (lambda pipe: _load_ip_adapter(pipe, encoder=False), EMBEDS),
    "IP-Adapter and none": (_ip_adapter_and_none, {}),
    "textual inversion": (_textual_inversion, {"prompt": "a <boat> at night"}),
    "textual inversion and none": (_textual_inversion_and_none, {}),
    "pipe.unet": (lambda pipe: setattr(pipe, "unet", another_unet()), {}),
    "register_modules": (lambda pipe: pipe.register_modules(unet=another_unet(layers=2)), {}),
    "pipe.vae": (lambda pipe: setattr(pipe, "vae", parts.autoencoder(layers_per_block=2)), {}),
    "pipe.scheduler": (_scheduler, {}),
    "set_attn_processor": (_processor, {}),
    "enable_attention_slicing": (lambda pipe: pipe.enable_attention_slicing(1), {}),
    "set_attention_backend": (lambda pipe: pipe.unet.set_attention_backend("native"), {}),
    "fuse_qkv_projections": (lambda pipe: pipe.fuse_qkv_projections(), {}),
    "fuse_qkv_projections and not": (_fused_and_not, {}),
    "fuse_qkv_projections of the network": (lambda pipe: pipe.unet.fuse_qkv_projections(), {}),
    "enable_freeu": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), {}),
    "channels last": (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), {}),
    "a layer": (_another_layer, {}),
    "a weight": (_another_weight, {}),
    "no middle": (lambda pipe: setattr(pipe.unet, "mid_block", None), {}),
}
