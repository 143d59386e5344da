"""What a device computes beside steps: products in 8 bits, and decodes of large pictures, whole and row by row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gpu_networks import built
from gpu_place import Place, host_peak
from lowtide.ops.quantization import dequantize, fits_bfloat16, fp8_linear, quantize

PRODUCTS = {"flux up": (4608, 3072, 12288), "flux out": (4608, 15360, 3072), "sdxl": (8192, 1280, 5120)}
"""Rows, numbers in, numbers out."""


def fp8_products(place: Place) -> dict[str, Any]:
    """Seconds of a linear layer in bfloat16, with a weight in fp8 that is dequantized first, and multiplied in fp8."""
    found = {}
    for name, (rows, width, out) in PRODUCTS.items():
        shape = (32, 64, 128) if place.tiny else (rows, width, out)
        found[name] = {"shape": list(shape), **of_product(place, *shape)}
    return found


def of_product(place: Place, rows: int, width: int, out: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, width, generator=generator).bfloat16().to(place.device) for count in (rows, out))
    weight = weight / width**0.5
    values, scale = quantize(weight, torch.float8_e4m3fn, scaled=True)
    room, fits = torch.empty_like(weight), fits_bfloat16(scale)
    exact = F.linear(x.float(), weight.float())

    def dequantized() -> torch.Tensor:
        return F.linear(x, dequantize(values, scale, room, scale_fits=fits))

    ways = {"bf16": lambda: F.linear(x, weight), "dequantized": dequantized,
        "fp8": lambda: fp8_linear(x, values, scale, None)}  # fmt: skip
    found: dict[str, Any] = {}
    for name, way in ways.items():
        try:
            error = float((way().float() - exact).norm() / exact.norm())
        except RuntimeError as refusal:  # a device without such units
            found[name] = {"refused": str(refusal)[:300]}
            continue
        found[name] = {"seconds": place.seconds(way, 1 if place.tiny else 20), "relative_error": error}
    return found


def decodes(place: Place, side: int) -> dict[str, Any]:
    """The autoencoder's decode of one picture: row by row, then whole where that has room; seconds and peaks."""
    from lowtide.models.vae import AutoencoderKL

    small = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4} if place.tiny else {}
    vae = built(lambda: AutoencoderKL.from_config(small), place.device, place.dtype)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side // 8, side // 8, generator=generator).to(place.dtype).to(place.device)
    weights = sum(weight.numel() * weight.itemsize for weight in vae.parameters())
    found: dict[str, Any] = {"side": side, "weights": weights}
    vae.enable_tiling("exact", work=200_000 if place.tiny else None)
    found["exact"], by_rows = one_decode(place, vae, latents)
    vae.disable_tiling()
    try:
        found["whole"], whole = one_decode(place, vae, latents)
    except torch.OutOfMemoryError as error:
        return found | {"whole": {"out of memory": str(error)[:200]}}
    return found | {"difference": float((whole - by_rows).abs().max()), "host_peak": host_peak()}


def one_decode(place: Place, vae: Any, latents: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds of the second decode, the peak of both beside what was there before, and the picture on the host."""
    place.tidy()
    before = place.kind.allocated(place.device)
    with torch.no_grad():
        picture = vae.decode(latents).sample.float().cpu()
        seconds = place.series(lambda: vae.decode(latents).sample, 1)[0]
    allocated, reserved = place.kind.peaks(place.device)
    return {"seconds": seconds, "peak": allocated - before, "peak_reserved": reserved}, picture
