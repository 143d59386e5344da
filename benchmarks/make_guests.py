"""Write checkpoints with the shapes of published models of others, with random weights in bfloat16.

    python benchmarks/make_guests.py [sdxl z-image flux wan]

They go to `runs/guests/`: 7, 20, 24 and 15 GB. Tokenizers are tiny ones, so prompts are as long as their letters say.
Speed and memory do not depend on the values of weights. Needs `diffusers`.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from compare import HERE
from gpu_networks import SDXL_UNET

sys.path.insert(0, str(HERE.parent))
from tests.guests import guest_tokenizers as tokenizers

ROOT = Path("runs/guests")
SHARD_BYTES = 4 * 10**9
PIECE = 2**24
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip


def sdxl() -> Any:
    """Stable Diffusion XL: a U-Net of 2.6 billion parameters, two text encoders."""
    import diffusers as d
    import transformers as t

    return d.StableDiffusionXLPipeline(
        vae=d.AutoencoderKL(**VAE, scaling_factor=0.13), tokenizer=tokenizers.clip(77), tokenizer_2=tokenizers.clip(77),
        text_encoder=t.CLIPTextModel(t.CLIPTextConfig(**CLIP)),
        text_encoder_2=t.CLIPTextModelWithProjection(t.CLIPTextConfig(**CLIP_G)),
        unet=d.UNet2DConditionModel(**SDXL_UNET),
        scheduler=d.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )  # fmt: skip


def z_image() -> Any:
    """Z-Image: a transformer of 6.2 billion parameters, and Qwen3 of 4 billion to read prompts."""
    import diffusers as d
    import transformers as t

    text = t.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    )  # fmt: skip
    return d.ZImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokenizers.qwen(),
        vae=d.AutoencoderKL(**VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=0.36, shift_factor=0.1),
        text_encoder=t.Qwen3Model(text), transformer=d.ZImageTransformer2DModel(),
    )  # fmt: skip


def flux() -> Any:
    """FLUX.1: a transformer of 12 billion parameters. Its text encoders have few layers here, and its own widths."""
    import diffusers as d
    import transformers as t

    return d.FluxPipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tokenizer=tokenizers.clip(77),
        tokenizer_2=tokenizers.t5(512), text_encoder=t.CLIPTextModel(t.CLIPTextConfig(**CLIP)),
        text_encoder_2=t.T5EncoderModel(t.T5Config(**{**T5, "num_layers": 2})),
        vae=d.AutoencoderKL(**VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=0.36, shift_factor=0.1),
        transformer=d.FluxTransformer2DModel(guidance_embeds=True),
    )  # fmt: skip


def wan() -> Any:
    """Wan 2.1 of 1.3 billion parameters, with the whole of UMT5."""
    import diffusers as d
    import transformers as t

    return d.WanPipeline(
        tokenizer=tokenizers.t5(512), text_encoder=t.UMT5EncoderModel(t.UMT5Config(**T5, vocab_size=256384)),
        transformer=d.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
        vae=d.AutoencoderKLWan(),
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {"sdxl": sdxl, "z-image": z_image, "flux": flux, "wan": wan}


def write(name: str) -> Path:
    """The folder of a model, which is written if it is not there."""
    from accelerate import init_empty_weights
    from torch import nn

    target = ROOT / name
    if (target / "model_index.json").is_file():
        return target
    torch.set_default_dtype(torch.bfloat16)
    with init_empty_weights(include_buffers=False):
        pipe = MODELS[name]()
    torch.set_default_dtype(torch.float32)
    for part_name, part in pipe.components.items():
        folder = target / part_name
        if isinstance(part, nn.Module):
            if hasattr(part, "tie_weights"):
                part.tie_weights()
            folder.mkdir(parents=True, exist_ok=True)
            part.config.save_pretrained(folder) if hasattr(part, "base_model_prefix") else part.save_config(folder)
            write_weights(folder, part, "model" if hasattr(part, "base_model_prefix") else "diffusion_pytorch_model")
        elif part is not None:
            part.save_pretrained(folder)
    pipe.save_config(target)  # the index comes last: where it is, all is
    return target


def write_weights(folder: Path, network: Any, base: str) -> None:
    """Random numbers for every weight, in shards."""
    tensors = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in tensors.values()):
            tensors[name] = tensor
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if sum(x.numel() * x.itemsize for x in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    noise = (0.02 * torch.randn(PIECE)).bfloat16()
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{base}-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{base}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header(shard))
            for name, tensor in shard.items():
                for piece in numbers(name, tensor, noise):
                    stream.write(memoryview(piece.view(torch.uint8).numpy()))
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def header(shard: dict[str, Any]) -> bytes:
    """The header of a safetensors file; all floating-point weights are bfloat16."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in shard.items():
        is_float = tensor.is_floating_point()
        size = tensor.numel() * (2 if is_float else tensor.itemsize)
        entries[name] = {"dtype": "BF16" if is_float else "I64", "shape": list(tensor.shape),
            "data_offsets": [place, place + size]}  # fmt: skip
        place += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def numbers(name: str, tensor: Any, noise: torch.Tensor) -> Iterator[torch.Tensor]:
    """The numbers of a weight: small noise for matrices, ones for norms, zeros for biases; of a buffer, its own."""
    if not tensor.is_meta:
        yield tensor.detach().reshape(-1).to(torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
    elif tensor.ndim < 2:
        yield torch.full((tensor.numel(),), 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    else:
        for first in range(0, tensor.numel(), PIECE):
            yield noise[: min(PIECE, tensor.numel() - first)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, []])
    for name in parser.parse_args().models:
        print(write(name), flush=True)


if __name__ == "__main__":
    main()
