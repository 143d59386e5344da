"""Make the shipped model from nothing: `python -m training.train all` (see training/README.md).

Every stage continues from its last checkpoint in `--out`, so the command can be stopped and started again.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import CLIPTokenizer

from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from training.autoencoder import encode_all, to_pixels, train_autoencoder
from training.data import load_or_render
from training.denoiser import CONFIG, Latents, TextToLatents, sample_pictures, train_denoiser
from training.export import export
from training.loop import Schedule
from training.seascapes import sheet
from training.text import make_text_encoder, make_tokenizer, tokenize


def main() -> None:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures, captions = load_or_render(options.out, options.pictures, options.seed, os.cpu_count() or 1)
    schedule = Schedule(steps=options.autoencoder_steps, rate=8e-4)
    vae = train_autoencoder(pictures, schedule, batch=8, seed=options.seed, device=device, out=options.out)
    if options.stage == "autoencoder":
        return
    tokenizer = make_tokenizer(captions, options.out / "tokenizer")
    data = latents(
        vae, pictures, tokenize(tokenizer, captions), tokenize(tokenizer, [""]), device, options.out / "latents.pt"
    )
    model = denoiser(tokenizer, options, device)
    schedule = Schedule(steps=options.denoiser_steps, rate=6e-4, save_every=1000)
    look = partial(look_at, vae=vae, data=data, out=options.out)
    trained = train_denoiser(model, data, schedule, 32, options.seed, options.out / "denoiser.pt", look)
    if options.stage == "all":
        export(vae, trained, tokenizer, data.scaling_factor, options.model)


def latents(
    vae: AutoencoderKL,
    pictures: np.ndarray,
    ids: torch.Tensor,
    empty_ids: torch.Tensor,
    device: torch.device,
    kept: Path,
) -> Latents:
    """Encode all pictures once. The scaling factor makes the latents' standard deviation 1, like that of the noise."""
    if not kept.exists():
        torch.save(encode_all(vae, pictures, device), kept)
    mean, std = torch.load(kept, weights_only=True)
    spread = float((mean.var() + (std**2).mean()).sqrt())
    print(f"latents: mean {float(mean.mean()):.3f}, deviation {spread:.3f}", flush=True)
    return Latents(mean=mean, std=std, ids=ids, empty_ids=empty_ids, scaling_factor=round(1 / spread, 5))


def denoiser(tokenizer: CLIPTokenizer, options: argparse.Namespace, device: torch.device) -> TextToLatents:
    torch.manual_seed(options.seed + 1)
    model = TextToLatents(UNet2DConditionModel(CONFIG), make_text_encoder(tokenizer))
    return model.to(device)


def look_at(model: nn.Module, step: int, *, vae: AutoencoderKL, data: Latents, out: Path) -> None:
    assert isinstance(model, TextToLatents)
    pictures = sample_pictures(model.eval(), vae, data.ids[:32], data.empty_ids, data.scaling_factor)
    sheet(to_pixels(pictures), columns=8).save(out / f"denoiser-{step}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["autoencoder", "denoiser", "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/seascapes"))
    parser.add_argument("--model", type=Path, default=Path("src/lowtide/assets/seascapes"))
    parser.add_argument("--pictures", type=int, default=30000)
    parser.add_argument("--autoencoder-steps", type=int, default=7000)
    parser.add_argument("--denoiser-steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
