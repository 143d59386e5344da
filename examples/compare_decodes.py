"""Decode one picture whole, in blended tiles and row by row, and show how each differs from the whole decode.

    python examples/compare_decodes.py [--size 1024] [--out docs/decodes.png]

Tiles have the shipped model's own size. Differences are enlarged twenty times, and grey means none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lowtide import StableDiffusionPipeline, UniPCMultistepScheduler

MODEL = Path(__file__).parents[1] / "src" / "lowtide" / "assets" / "seascapes"
PROMPT = "a red sailboat on a calm sea at sunset, a lighthouse on the left"
PANEL, HEAD = 480, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("decodes.png"))
    options = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    latents = pipe(
        PROMPT,
        width=options.size,
        height=options.size,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = {name: decode(pipe, latents, mode) for name, mode in MODES.items()}
    whole = decoded["whole"]
    panels = {"whole": whole, "blended tiles": decoded["blended"], "row by row": decoded["exact"]}
    for name, title in (("blended", "tiles - whole, x20"), ("exact", "row by row - whole, x20")):
        panels[title] = ((decoded[name] - whole) * 20 + 0.5).clamp(0, 1)
        error = (decoded[name] - whole).double()
        print(f"{name}: largest difference {float(error.abs().max()) * 255:.4f} grey levels")
    sheet(panels).save(options.out, optimize=True)


MODES = {"whole": None, "blended": "blended", "exact": "exact"}


def decode(pipe: StableDiffusionPipeline, latents: torch.Tensor, mode: str | None) -> torch.Tensor:
    """The picture `[1, 3, H, W]` in [0, 1]."""
    pipe.disable_vae_tiling()
    if mode is not None:
        pipe.enable_vae_tiling(mode)
    return pipe.decode_latents(latents)


def sheet(panels: dict[str, torch.Tensor]) -> Image.Image:
    """The panels in two rows, with their titles."""
    canvas = Image.new("RGB", (3 * PANEL + 40, 2 * (PANEL + HEAD) + 10), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    for (title, pixels), (row, column) in zip(panels.items(), ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)), strict=True):
        picture = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
        left, top = 10 + column * (PANEL + 10), row * (PANEL + HEAD)
        canvas.paste(picture.resize((PANEL, PANEL), Image.Resampling.BOX), (left, top + HEAD))
        draw.text((left, top + 8), title, fill="black", font=font)
    return canvas


if __name__ == "__main__":
    main()
