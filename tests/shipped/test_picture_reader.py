"""The judge of the shipped model is itself judged, on pictures whose content is known."""

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from tests.shipped import picture_reader
from tests.shipped.picture_reader import Reading, read_picture
from training.seascapes import Scene, render, sample_scene

COUNT, FEW = 300, 100
DAMAGED = 2 / 5
"""Of so many pictures so large a share is damaged in each way."""
Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def keep(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(1, 2))))


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def shift_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image * rng.uniform(0.94, 1.06, 3) + rng.uniform(-8, 8, 3), 0, 255).astype(np.uint8)


def all_at_once(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return add_noise(shift_colors(blur(image, rng), rng), rng)


def truth(scene: Scene) -> Reading:
    has_boat, has_landmark = scene.boat_kind != "none", scene.landmark != "none"
    return Reading(
        time=scene.time,
        boat_color=scene.boat_color if has_boat else None,
        landmark=scene.landmark if has_landmark else None,
        landmark_side=scene.side if has_landmark else None,
    )


@cache
def pictures(count: int) -> list[tuple[Reading, np.ndarray]]:
    made = []
    for index in range(count):
        rng = np.random.default_rng((20, index))
        scene = sample_scene(rng)
        made.append((truth(scene), render(scene, rng)))
    return made


@cache
def readings(damage: Damage, count: int) -> list[Reading]:
    rng = np.random.default_rng(21)
    share = 1 if damage is keep else DAMAGED
    return [read_picture(damage(image, rng)) for _, image in pictures(count)[: int(share * count)]]


def scores(truths: list[Reading], seen: list[Reading]) -> dict[str, float]:
    pairs = list(zip(truths, seen, strict=True))
    boats = [(t, s) for t, s in pairs if t.boat_color]
    lighthouses = [(t, s) for t, s in pairs if t.landmark == "lighthouse"]
    return {
        "boat": float(np.mean([t.boat_color == s.boat_color for t, s in boats])),
        "time": float(np.mean([t.time == s.time for t, s in pairs])),
        "side": float(np.mean([t.landmark_side == s.landmark_side for t, s in lighthouses])),
        "nothing": float(np.mean([s.boat_color is None for t, s in pairs if not t.boat_color])),
        "landmark": float(np.mean([t.landmark == s.landmark for t, s in pairs])),
    }


of_many = pytest.mark.parametrize("count", [FEW, pytest.param(COUNT, marks=pytest.mark.slow)])


@of_many
@pytest.mark.parametrize("damage", [keep, blur, add_noise, shift_colors, all_at_once])
def test_reads_known_pictures(damage: Damage, count: int):
    seen = readings(damage, count)
    found = scores([known for known, _ in pictures(count)[: len(seen)]], seen)
    assert found["boat"] >= 0.97, found
    assert found["time"] >= 0.97, found
    assert found["side"] >= 0.97, found
    assert found["nothing"] >= 0.9, found
    assert found["landmark"] >= 0.95, found


@of_many
def test_shuffled_truth_falls_to_chance(count: int):
    truths = [known for known, _ in pictures(count)]
    order = np.random.default_rng(22).permutation(count)
    found = scores([truths[index] for index in order], readings(keep, count))
    assert found["boat"] < 0.3
    assert found["time"] < 0.4
    assert found["side"] < 0.5


@pytest.mark.parametrize("color", ["red", "blue", "green", "yellow", "white", "black"])
@pytest.mark.parametrize("time", ["day", "sunset", "night", "dawn"])
def test_reads_every_color_at_every_time(color: str, time: str):
    body = "moon" if time == "night" else "sun"
    for kind in ("sailboat", "fishing boat", "steamship"):
        scene = Scene(time, "calm", kind, color, "lighthouse", "left", body, clouds=True, stars=False, birds=False)
        seen = read_picture(render(scene, np.random.default_rng(23)))
        assert seen == Reading(time, color, "lighthouse", "left"), kind


def test_mirror_changes_the_side_and_nothing_else():
    swap = {"left": "right", "right": "left"}
    for (known, image), seen in zip(pictures(FEW)[:60], readings(keep, FEW), strict=False):
        mirrored = read_picture(np.ascontiguousarray(image[:, ::-1]))
        if known.landmark == "lighthouse":
            assert seen.landmark_side is not None
            assert mirrored == replace(seen, landmark_side=swap[seen.landmark_side])


@pytest.mark.parametrize("color", [(0, 0, 0), (90, 90, 90), (160, 160, 160), (255, 255, 255), (40, 90, 160)])
def test_finds_nothing_in_flat_pictures(color: tuple[int, int, int]):
    seen = read_picture(np.full((128, 128, 3), color, np.uint8))
    assert (seen.boat_color, seen.landmark) == (None, None)


def test_refuses_other_shapes_and_types():
    with pytest.raises(ValueError, match="128"):
        read_picture(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="float32"):
        read_picture(np.zeros((128, 128, 3), np.float32))


def test_shares_no_code_with_the_training():
    imported = set()
    for node in ast.walk(ast.parse(Path(picture_reader.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"dataclasses", "numpy"}
