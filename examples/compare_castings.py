"""What 8-bit weights do to pictures: the same prompts and seeds in bfloat16, fp8 and int8, side by side.

    python examples/compare_castings.py [--out docs/casting.png]

Writes the pictures on one sheet. Prints for each form of the weights how far its pictures are from those in bfloat16
(PSNR in dB, mean over the prompts). All networks of the shipped model are cast.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lowtide import StableDiffusionPipeline

MODEL = Path(__file__).parents[1] / "src" / "lowtide" / "assets" / "seascapes"
PROMPTS = (
    "a red sailboat on a calm sea at sunset",
    "a blue steamship on a rough sea at night, a lighthouse on the left",
    "a yellow fishing boat on a calm sea at dawn",
    "a white sailboat on a calm sea in the daytime, a lighthouse on the right",
    "a green steamship on a calm sea at sunset",
)
PLAIN_FP8 = "fp8, no scale"
COLUMNS = ("float32", "bfloat16", "int8", "fp8", PLAIN_FP8)
MARGIN, SIDE = 6, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/casting.png"))
    options = parser.parse_args()
    columns = {name: pictures(name) for name in COLUMNS}
    for name, found in columns.items():
        print(f"{name}: {np.mean([psnr(a, b) for a, b in zip(found, columns['bfloat16'], strict=True)]):.1f} dB")
    sheet(columns).save(options.out)


def pictures(name: str) -> list[np.ndarray]:
    """One picture `[H, W, 3]` in [0, 1] for each prompt."""
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    casting = name if name in ("fp8", "int8") else None
    pipe: Any = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=dtype, casting=casting)
    if name == PLAIN_FP8:
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return list(pipe(list(PROMPTS), num_inference_steps=25, generator=seeds, output_type="np").images)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else -10 * np.log10(error)


def sheet(columns: dict[str, list[np.ndarray]]) -> Image.Image:
    """A row for each form of the weights, a column for each prompt."""
    width = 110 + len(PROMPTS) * (SIDE + MARGIN)
    page = Image.new("RGB", (width, MARGIN + len(columns) * (SIDE + MARGIN)), "white")
    draw = ImageDraw.Draw(page)
    for row, (name, found) in enumerate(columns.items()):
        top = MARGIN + row * (SIDE + MARGIN)
        draw.text((MARGIN, top + SIDE // 2 - 6), name, fill="black", font_size=14)
        for column, picture in enumerate(found):
            tile = Image.fromarray((picture * 255).round().astype(np.uint8)).resize((SIDE, SIDE))
            page.paste(tile, (110 + column * (SIDE + MARGIN), top))
    return page


if __name__ == "__main__":
    main()
