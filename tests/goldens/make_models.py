"""Writes models.json: outputs of the peer's tiny models and pipelines, for machines that do not have the peer.

Run from the repository's root, with diffusers installed: python -m tests.goldens.make_models
Weights and inputs follow the recipes of tests/tiny.py, so only the outputs are recorded.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from tests import tiny

PATH = Path(__file__).with_name("models.json")
PICTURES = {
    "ddim": ("DDIMScheduler", "sd1", {}),
    "pndm": ("PNDMScheduler", "sd1", {}),
    "unipc": ("UniPCMultistepScheduler", "sd1", {}),
    "euler": ("EulerDiscreteScheduler", "sd1", {}),
    "dpm": ("DPMSolverMultistepScheduler", "sd1", {}),
    "ddim v": ("DDIMScheduler", "sd2", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
}
PICTURE_CALL = {"prompt": "a red boat", "negative_prompt": "fog", "num_inference_steps": 3, "height": 16, "width": 24}
LATENTS = 1.7 * tiny.numbers((1, 4, 4, 6), 4)
UNET_SIZE = (6, 9)
VIDEO_SIZES = {kind: (2, 8, 12) if kind == "picture" else (2, 4, 6) for kind in tiny.TRANSFORMERS}
PIXELS = tiny.numbers((1, 3, 16, 24), 5)
LOOKED_AT = 2 * tiny.numbers((40, 3, 16, 16), 9) * torch.linspace(0.1, 1.5, 40)[:, None, None, None]
THRESHOLD = 0.5


def entry(tensor: torch.Tensor) -> dict:
    """Shape and values, with all the digits that fp32 has."""
    return {"shape": list(tensor.shape), "values": [float(f"{value:.9g}") for value in tensor.flatten().tolist()]}


@torch.no_grad()
def unets() -> dict:
    import diffusers

    models = {kind: tiny.set_weights(diffusers.UNet2DConditionModel(**entries)) for kind, entries in tiny.UNETS.items()}
    return {kind: entry(model(**tiny.unet_inputs(kind, UNET_SIZE, 1)).sample) for kind, model in models.items()}


@torch.no_grad()
def transformers() -> dict:
    import diffusers

    outputs = {}
    for kind, size in VIDEO_SIZES.items():
        model = tiny.set_weights(diffusers.CogVideoXTransformer3DModel(**tiny.TRANSFORMERS[kind]))
        outputs[kind] = entry(model(**tiny.video_inputs(kind, size, 1)).sample)
    return outputs


@torch.no_grad()
def vaes() -> dict:
    import diffusers

    outputs = {}
    for kind, entries in tiny.VAES.items():
        model = tiny.set_weights(diffusers.AutoencoderKL(**entries))
        posterior = model.encode(PIXELS).latent_dist
        decoded = model.decode(posterior.mean).sample
        outputs[kind] = {"mean": entry(posterior.mean), "std": entry(posterior.std), "decoded": entry(decoded)}
    return outputs


def verdicts() -> list[bool]:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    return tiny.safety_checker(THRESHOLD, StableDiffusionSafetyChecker)(LOOKED_AT, LOOKED_AT.clone())[1]


def pictures(folder: Path) -> dict:
    import diffusers

    words = tiny.tokenizer(folder)
    outputs = {}
    for case, (name, kind, entries) in PICTURES.items():
        pipe = diffusers.StableDiffusionPipeline(
            unet=tiny.set_weights(diffusers.UNet2DConditionModel(**tiny.UNETS[kind])),
            vae=tiny.set_weights(diffusers.AutoencoderKL(**tiny.VAE)),
            text_encoder=tiny.text_encoder(len(words)),
            tokenizer=words,
            scheduler=getattr(diffusers, name).from_config(tiny.scheduler(name, **entries).config.to_dict()),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        outputs[case] = entry(pipe(**PICTURE_CALL, latents=LATENTS, output_type="pt").images)
    return outputs


def main() -> None:
    import diffusers

    with tempfile.TemporaryDirectory() as folder:
        goldens = {
            "diffusers": diffusers.__version__,
            "unets": unets(),
            "transformers": transformers(),
            "vaes": vaes(),
            "verdicts": verdicts(),
            "pictures": pictures(Path(folder)),
        }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in goldens.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
