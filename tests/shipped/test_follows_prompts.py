"""The shipped model does what its prompts say, as an independent reader of its pictures finds."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.shipped.picture_reader import Reading, read_picture

from lowtide import StableDiffusionPipeline

MODEL = Path(__file__).parents[2] / "src" / "lowtide" / "assets" / "seascapes"
COLORS = ("red", "blue", "green", "yellow", "white", "black")
TIMES = {"day": "in the daytime", "sunset": "at sunset", "night": "at night", "dawn": "at dawn"}
KINDS = ("sailboat", "fishing boat", "steamship")
SIDES = ("left", "right")
FEW, PROMPTS = 24, 72
BATCH = 12
STEPS = {FEW: 6, PROMPTS: 20}
CHANCE = {"boat_color": 1 / len(COLORS), "time": 1 / len(TIMES), "landmark_side": 1 / len(SIDES)}


def scenes(count: int = PROMPTS) -> list[tuple[str, dict[str, str]]]:
    """Prompts and what a picture of each must show, every combination of colour, time and side at least once.

    A few have every colour at every time, with the sides in turn.
    """
    chosen = list(product(COLORS, TIMES, SIDES))
    chosen += chosen[::2]
    if count == FEW:
        pairs = enumerate(product(COLORS, TIMES))
        chosen = [(color, time, SIDES[(index + index // len(TIMES)) % 2]) for index, (color, time) in pairs]
    found = []
    for index, (color, time, side) in enumerate(chosen[:count]):
        kind = KINDS[index % len(KINDS)]
        prompt = f"a {color} {kind} on a calm sea {TIMES[time]}, a lighthouse on the {side}"
        found.append((prompt, {"boat_color": color, "time": time, "landmark_side": side}))
    return found


@pytest.fixture(scope="module", params=[FEW, pytest.param(PROMPTS, marks=pytest.mark.slow)])
def count(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def truths(count: int) -> list[dict[str, str]]:
    return [truth for _, truth in scenes(count)]


@pytest.fixture(scope="module")
def readings(count: int) -> list[Reading]:
    return readings_of(StableDiffusionPipeline.from_pretrained(MODEL), count)


def readings_of(pipe: StableDiffusionPipeline, count: int = PROMPTS) -> list[Reading]:
    pipe.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt, _ in scenes(count)]
    pictures = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(batch))]
        pictures += pipe(batch, num_inference_steps=STEPS[count], guidance_scale=5.0, generator=seeds).images
    return [read_picture(np.asarray(picture)) for picture in pictures]


def shares(readings: list[Reading], truths: list[dict[str, str]]) -> dict[str, float]:
    return {
        name: float(np.mean([getattr(r, name) == truth[name] for r, truth in zip(readings, truths, strict=True)]))
        for name in CHANCE
    }


def test_pictures_show_what_the_prompts_say(readings, truths):
    for name, share in shares(readings, truths).items():
        assert share >= 0.9, f"{name}: {share:.0%} right"


def test_shuffled_prompts_fall_to_chance(readings, truths):
    """The negative control: held against other prompts, the same pictures are right as often as chance has it."""
    order = [np.random.default_rng(seed).permutation(len(truths)) for seed in range(20)]
    shuffled = [shares(readings, [truths[i] for i in permutation]) for permutation in order]
    for name, chance in CHANCE.items():
        share = float(np.mean([found[name] for found in shuffled]))
        assert abs(share - chance) <= 0.08, f"{name}: {share:.0%} right by chance, {chance:.0%} expected"


def test_the_model_is_small():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24_000_000


@pytest.fixture(scope="module")
def half_shares() -> dict[str, float]:
    return cast_shares(None)


def cast_shares(casting: str | None) -> dict[str, float]:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16, casting=casting)
    return shares(readings_of(pipe), [truth for _, truth in scenes()])


@pytest.mark.slow
@pytest.mark.parametrize("casting", ["fp8", "int8"])
def test_8_bit_weights_follow_prompts_as_well(casting, half_shares):
    """All networks cast; within two points of bfloat16, of which one picture of 72 is 1.4."""
    found = cast_shares(casting)
    for name, share in half_shares.items():
        assert found[name] >= share - 0.02, f"{name}: {found[name]:.1%} right, {share:.1%} in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("networks", ["all", "unet"])
def test_4_bit_weights_follow_prompts_as_well(networks):
    """Within three points of float32, of which one picture of 72 is 1.4."""
    truths = [truth for _, truth in scenes()]
    plain = shares(readings_of(StableDiffusionPipeline.from_pretrained(MODEL)), truths)
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, casting="int4" if networks == "all" else None)
    if networks == "unet":
        pipe.unet.enable_layerwise_casting(torch.int4)
    for name, share in shares(readings_of(pipe), truths).items():
        assert share >= plain[name] - 0.03, f"{name}: {share:.1%} right, {plain[name]:.1%} in float32"
