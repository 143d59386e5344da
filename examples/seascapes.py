"""Make a sheet of eight pictures with the shipped model: `python examples/seascapes.py docs/seascapes.png`."""

import sys
from pathlib import Path

import torch
from PIL import Image

import lowtide

MODEL = Path(lowtide.__file__).parent / "assets" / "seascapes"
PROMPTS = (
    "a red sailboat on a calm sea at sunset",
    "a blue steamship on a rough sea at night, a lighthouse on the left, a moon and stars",
    "a yellow fishing boat at dawn, an island on the right",
    "a white sailboat on a calm sea in the daytime with clouds and birds",
    "a green steamship at sunset, a lighthouse on the right",
    "a black sailboat on a rough sea in the morning",
    "a red fishing boat at night, an island on the left, a moon",
    "a yellow sailboat on a rough sea at noon, a lighthouse on the right",
)


def main(path: Path) -> None:
    pipe = lowtide.StableDiffusionPipeline.from_pretrained(MODEL)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    pictures = pipe(list(PROMPTS), num_inference_steps=30, guidance_scale=5.0, generator=seeds).images
    sheet = Image.new("RGB", (4 * 200 + 20, 2 * 200 + 12), "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, 4)
        sheet.paste(picture.resize((196, 196), Image.Resampling.LANCZOS), (4 + column * 204, 4 + row * 204))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
