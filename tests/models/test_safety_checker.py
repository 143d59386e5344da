"""The safety checker: what it flags, and its files under old and new names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from lowtide.models.safety_checker import StableDiffusionSafetyChecker
from lowtide.weights.index import CheckpointError

PICTURES = 2 * tiny.numbers((24, 3, 16, 16), 9) * torch.linspace(0.1, 1.5, 24)[:, None, None, None]


def save(checker, folder, **options):
    folder.mkdir(exist_ok=True)
    checker.write_to(folder, **{"variant": None, "max_shard_size": None, **options})
    return folder


def embeddings(checker):
    return checker.visual_projection(checker.vision_model(PICTURES).pooler_output)


@torch.no_grad()
def test_a_picture_is_flagged_where_it_is_nearer_than_a_threshold():
    checker = tiny.safety_checker()
    near = torch.nn.functional.cosine_similarity(embeddings(checker)[:, None], checker.concept_embeds[None], dim=2)
    checker.special_care_embeds_weights.fill_(2.0)  # never near
    for threshold in (0.3, 0.5, 0.6, 0.7):
        checker.concept_embeds_weights.fill_(threshold)
        assert checker(PICTURES) == (near - threshold > 0.0005).any(dim=1).tolist()


@torch.no_grad()
def test_near_a_special_concept_the_threshold_is_lower_by_a_hundredth():
    checker = tiny.safety_checker()
    near = torch.nn.functional.cosine_similarity(embeddings(checker)[:, None], checker.concept_embeds[None], dim=2)
    closest = near.max(dim=1).values
    checker.concept_embeds_weights.fill_(closest.median() + 0.005)
    checker.special_care_embeds_weights.fill_(2.0)
    usual = checker(PICTURES)
    checker.special_care_embeds_weights.fill_(-2.0)  # always near
    strict = checker(PICTURES)
    assert sum(strict) > sum(usual)
    assert all(later or not before for before, later in zip(usual, strict, strict=True))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", [None, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, variant, shard_size, dtype):
    checker = tiny.safety_checker(0.5).to(dtype)
    folder = save(checker, tmp_path, variant=variant, max_shard_size=shard_size)
    loaded = StableDiffusionSafetyChecker.from_folder(folder, dtype=None, variant=variant)
    state, expected = loaded.state_dict(), checker.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert loaded(PICTURES.to(dtype)) == checker(PICTURES.to(dtype))
    assert not loaded.training


def published(file):
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def test_files_of_old_and_new_classes_are_read(tmp_path):
    """The published file wraps the vision tower twice and holds position ids; newer classes wrap it once."""
    checker = tiny.safety_checker(0.5)
    file = save(checker, tmp_path) / "model.safetensors"
    tensors = published(file)
    assert "vision_model.vision_model.encoder.layers.0.mlp.fc1.weight" in tensors
    old = {**tensors, "vision_model.vision_model.embeddings.position_ids": torch.arange(5)[None]}
    new = {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in tensors.items()}
    for layout in (old, new):
        save_file(layout, file)
        assert StableDiffusionSafetyChecker.from_folder(tmp_path, dtype=None)(PICTURES) == checker(PICTURES)


def test_a_config_that_cannot_be_read(tmp_path):
    file = save(tiny.safety_checker(), tmp_path) / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "projection_dim": "six"}))
    with pytest.raises(CheckpointError, match=r"config.json: Safety checker config: projection_dim"):
        StableDiffusionSafetyChecker.from_folder(tmp_path, dtype=None)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json, so it is not a StableDiffusionSafetyChecker"):
        StableDiffusionSafetyChecker.from_folder(tmp_path, dtype=None)
