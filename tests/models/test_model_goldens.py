"""Models and pictures against recorded ones of the peer, for machines that do not have it."""

import json
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.goldens import make_models as recipe

from lowtide.models import layers, unet, video_transformer
from lowtide.models.vae import AutoencoderKL

PATH = Path(__file__).parents[1] / "goldens" / "models.json"
GOLDENS = json.loads(PATH.read_text(encoding="utf-8"))
TOLERANCE = 1e-5
PICTURE_TOLERANCE = 1 / 255 / 16  # of one grey level; steps and guidance enlarge the last bits' differences


def golden(entry):
    return torch.tensor(entry["values"]).reshape(entry["shape"])


@pytest.mark.parametrize("kind", tiny.UNETS)
@torch.no_grad()
def test_unet(kind, monkeypatch):
    model, inputs = tiny.unet(kind), tiny.unet_inputs(kind, recipe.UNET_SIZE, 1)
    expected = golden(GOLDENS["unets"][kind])
    assert tiny.difference(model(**inputs).sample, expected) <= TOLERANCE
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)):
        norm.eps = 1e-6  # negative controls: this, and sine and cosine swapped
    assert tiny.difference(model(**inputs).sample, expected) > TOLERANCE
    model = tiny.unet(kind)

    def swapped(timesteps, dim, **options):
        return layers.timestep_embedding(timesteps, dim, **{**options, "flip_sin_to_cos": False})

    monkeypatch.setattr(unet, "timestep_embedding", swapped)
    assert tiny.difference(model(**inputs).sample, expected) > TOLERANCE


@pytest.mark.parametrize("kind", tiny.TRANSFORMERS)
@torch.no_grad()
def test_video_transformer(kind, monkeypatch):
    model, inputs = tiny.video_transformer(kind), tiny.video_inputs(kind, recipe.VIDEO_SIZES[kind], 1)
    expected = golden(GOLDENS["transformers"][kind])
    assert tiny.difference(model(**inputs).sample, expected) <= TOLERANCE
    if "image_rotary_emb" in inputs:  # negative controls: positions, and sine and cosine swapped
        cos, sin = inputs["image_rotary_emb"]
        assert tiny.difference(model(**{**inputs, "image_rotary_emb": (cos, -sin)}).sample, expected) > TOLERANCE

    def swapped(timesteps, dim, **options):
        return layers.timestep_embedding(timesteps, dim, **{**options, "flip_sin_to_cos": False})

    monkeypatch.setattr(video_transformer, "timestep_embedding", swapped)
    assert tiny.difference(model(**inputs).sample, expected) > TOLERANCE


@pytest.mark.parametrize("kind", tiny.VAES)
@torch.no_grad()
def test_autoencoder(kind):
    expected = {name: golden(entry) for name, entry in GOLDENS["vaes"][kind].items()}
    for seed in (0, 1):
        model = tiny.set_weights(AutoencoderKL.from_config(tiny.VAES[kind]), seed)
        posterior = model.encode(recipe.PIXELS).latent_dist
        decoded = model.decode(expected["mean"]).sample
        errors = [
            tiny.difference(posterior.mean, expected["mean"]),
            tiny.difference(posterior.std, expected["std"]),
            tiny.difference(decoded, expected["decoded"]),
        ]
        if seed == 0:
            assert max(errors) <= TOLERANCE
        else:  # negative control
            assert min(errors) > TOLERANCE


def test_safety_checker():
    expected = GOLDENS["verdicts"]
    assert 0 < sum(expected) < len(expected)
    assert tiny.safety_checker(recipe.THRESHOLD)(recipe.LOOKED_AT) == expected
    assert tiny.safety_checker(recipe.THRESHOLD + 0.01)(recipe.LOOKED_AT) != expected  # negative control


@pytest.mark.parametrize("case", recipe.PICTURES)
def test_picture(case, tmp_path):
    name, kind, entries = recipe.PICTURES[case]
    pipe = tiny.pipeline(tmp_path, unet=tiny.unet(kind), schedule=tiny.scheduler(name, **entries))
    expected = golden(GOLDENS["pictures"][case])
    call = {**recipe.PICTURE_CALL, "latents": recipe.LATENTS, "output_type": "pt"}
    assert (pipe(**call).images - expected).abs().max() <= PICTURE_TOLERANCE
    assert expected.std() > 0.05
    for broken in ({"guidance_scale": 7.4}, {"negative_prompt": "fo"}, {"latents": recipe.LATENTS * 1.01}):
        assert (pipe(**{**call, **broken}).images - expected).abs().max() > PICTURE_TOLERANCE  # negative controls


def test_every_scheduler_has_a_picture():
    assert {name for name, _, _ in recipe.PICTURES.values()} == set(tiny.SCHEDULERS)


def test_goldens_are_small():
    assert PATH.stat().st_size < 300_000
