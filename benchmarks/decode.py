"""Decode latents with autoencoders of Stable Diffusion's or CogVideoX's shapes: every way of ours and of diffusers.

    python benchmarks/decode.py [--sizes 1024x1024 600x880] [--rounds 3] [--dtype float32] [--rows exact whole ...]
    python benchmarks/decode.py --sizes 3840x2224 --rows exact-disk --rounds 1 --name large
    python benchmarks/decode.py --frames 5 --sizes 352x240 --rows whole exact-disk peer-whole --name clip

With `--frames`, a number of latent frames, clips are decoded. Rows take turns, and each run is a fresh process.
Memory is the kernel's high-water mark above what the process held before decoding. It then holds the model's weights
already (for clips, the decoder's alone). `process` is the high-water mark itself. Weights and latents are random, well
scaled and fixed; latents vary over the picture.
If the whole decode of the same library is among the rows, the others are compared with it: PSNR; the largest error, as
a share of the range; `seam`, the largest mean step of the error across one row or column of pixels; and `tone`, the
largest error of the mean of any 64x64 square. Seam and tone are in grey levels of 255.
Writes JSON and markdown to `benchmarks/results/`. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from compare import HERE, describe_machine, spread

CONFIG = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP_CONFIG = {"block_out_channels": [128, 256, 256, 512], "sample_height": 480, "sample_width": 720}
ROWS = ("whole", "exact", "exact-disk", "blended", "peer-whole", "peer-tiled")


def main() -> None:
    options = parse()
    if options.run:
        print(json.dumps(run(options.run, options)))
        return
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            results[size] = measure(size, folder, options)
    write(results, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x512", "600x880", "1024x1024"], help="WIDTHxHEIGHT")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--frames", type=int, help="latent frames of a clip; a picture without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="decode", help="of the result files")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--run", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(size: str, folder: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All rows in turn, `rounds` times; the picture of the first round is compared."""
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
    for number in range(options.rounds):
        for row in options.rows:
            keep = str(Path(folder) / f"{row}.npy")
            command = [sys.executable, __file__, "--run", row, "--sizes", size, "--dtype", options.dtype]
            command += ["--threads", str(options.threads), *(["--keep", keep] if number == 0 else [])]
            command += [] if options.frames is None else ["--frames", str(options.frames)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[row].append(json.loads(text.splitlines()[-1]))
            print(f"{size} round {number} {row}: {found[row][-1]}", flush=True)
    for row in options.rows:
        reference = Path(folder) / f"{'peer-whole' if row.startswith('peer') else 'whole'}.npy"
        if reference.is_file() and row not in ("whole", "peer-whole"):
            found[row][0] |= compared(np.load(Path(folder) / f"{row}.npy"), np.load(reference))
    return found


def run(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One decode in this process."""
    import torch

    from lowtide.measuring.peaks import PeakSource

    torch.set_num_threads(options.threads)
    width, height = (int(side) for side in options.sizes[0].split("x"))
    dtype = getattr(torch, options.dtype)
    with torch.no_grad():
        model, decode = DECODERS[row](row, options.frames)
        z = latents(height // 8, width // 8, options.frames).to(dtype)
        model.to(dtype)
        decode(z[..., :9, :9])  # the kernels of the first call are made
        peaks = PeakSource(interval=None)
        peaks.take()
        before = peaks.take().rss
        began = time.perf_counter()
        picture = decode(z)
        seconds = time.perf_counter() - began
        process = peaks.take().rss
    if options.keep:
        np.save(options.keep, picture[0].float().flatten(0, -3).numpy())
    versions = {name: version(name) for name in ("lowtide", "diffusers", "torch")}
    return {"seconds": seconds, "peak": process - before, "process": process, "versions": versions}


def ours(row: str, frames: int | None) -> tuple[Any, Callable[[Any], Any]]:
    from lowtide import AutoencoderKL, AutoencoderKLCogVideoX

    model = with_weights(
        AutoencoderKL.from_config(CONFIG) if frames is None else AutoencoderKLCogVideoX.from_config(CLIP_CONFIG)
    )
    if row == "blended":
        model.enable_tiling()
    elif row != "whole":
        model.enable_tiling("exact", rows="disk" if row == "exact-disk" else "device")
    return model, lambda z: model.decode(z).sample


def peer(row: str, frames: int | None) -> tuple[Any, Callable[[Any], Any]]:
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

    model = with_weights(AutoencoderKL(**CONFIG) if frames is None else AutoencoderKLCogVideoX(**CLIP_CONFIG))
    if row == "peer-tiled":
        model.enable_tiling()
    return model, lambda z: model.decode(z).sample


DECODERS: dict[str, Callable[[str, int | None], tuple[Any, Callable[[Any], Any]]]] = {
    row: peer if row.startswith("peer") else ours for row in ROWS
}


def with_weights(model: Any) -> Any:
    """Random weights, drawn by their names and scaled so that every layer keeps the variance of its input."""
    import torch
    from torch import nn

    state = model.state_dict()
    for name, tensor in state.items():
        values = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 2 - 1
        if tensor.ndim > 1:
            tensor.copy_(values * (3 / tensor[0].numel()) ** 0.5)
        else:
            tensor.copy_(1 + 0.3 * values if name.endswith("weight") else 0.2 * values)
    if "CogVideoX" in type(model).__name__:
        model.encoder = nn.Identity()
    return model.eval().requires_grad_(False)


def latents(rows: int, columns: int, frames: int | None) -> Any:
    """Noise around a tone that goes from dark to light over the picture."""
    import torch

    shape = (1, 4, rows, columns) if frames is None else (1, 16, frames, rows, columns)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-2, 2, columns) + torch.linspace(1, -1, rows)[:, None]
    return noise * torch.linspace(0.3, 1.2, rows)[:, None] + slope


def compared(picture: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """How far pictures `[channels, H, W]` are from the whole decode's."""
    error, extent = picture.astype(np.float64) - whole, float(whole.max() - whole.min())
    steps = [np.abs(np.diff(error, axis=axis)).mean(axis=(0, 3 - axis)).max() for axis in (1, 2)]
    rows, columns = (side // 64 * 64 for side in error.shape[1:])
    squares = error[:, :rows, :columns].reshape(-1, rows // 64, 64, columns // 64, 64).mean(axis=(2, 4))
    return {
        "psnr": float(10 * np.log10(extent**2 / np.square(error).mean())) if error.any() else float("inf"),
        "worst": float(np.abs(error).max() / extent),
        "seam": float(max(steps) / extent * 255),
        "tone": float(np.abs(squares).max() / extent * 255),
    }


def write(results: dict[str, dict[str, list[dict[str, Any]]]], options: argparse.Namespace) -> None:
    shapes = "Stable Diffusion's shapes" if options.frames is None else f"CogVideoX, {options.frames} latent frames"
    lines = [
        f"# Decoding: the autoencoder of {shapes}, {options.dtype}, CPU",
        "",
        f"Median (min to max) of each row's runs ({options.rounds}); rows take turns, and each run is a fresh process. "
        "Memory is in MB of 10^6 bytes, above what the process held before. benchmarks/decode.py explains the other "
        "columns.",
        "",
    ]
    for size, rows in results.items():
        lines += [f"## {size}", "", f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [*(line(row, rows) for row in rows), ""]
    about = describe_machine("benchmarks/decode.py", next(iter(results.values()))[options.rows[0]][0])
    lines += [f"- {key}: {value}" for key, value in about.items()]
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{options.name}-{options.dtype}"
    (options.out / f"{name}.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    (options.out / f"{name}.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def line(row: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    runs, first = rows[row], rows[row][0]
    cells = [spread([one[key] / 1e6 for one in runs]) for key in ("peak", "process")]
    cells.append(spread([one["seconds"] for one in runs]))
    for other in ("whole", "peer-whole", "peer-tiled"):
        pairs = [a["seconds"] / b["seconds"] for a, b in zip(runs, rows.get(other, []), strict=False)]
        cells.append(f"{statistics.median(pairs):.2f}x" if pairs else "")
    quality = [f"{first[key]:{form}}" if key in first else "" for key, form in QUALITY.items()]
    return f"| {row} | {' | '.join([*cells, *quality])} |"


COLUMNS = (
    "memory, MB",
    "process, MB",
    "seconds",
    "of whole",
    "of peer's whole",
    "of peer's tiles",
    "PSNR, dB",
    "worst",
    "seam",
    "tone",
)
QUALITY = {"psnr": ".1f", "worst": ".1e", "seam": ".3f", "tone": ".3f"}

if __name__ == "__main__":
    sys.exit(main())
