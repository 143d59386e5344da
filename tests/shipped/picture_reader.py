"""Reads a seascape the way a strict viewer would: colours, stripes and plain counting, on numpy alone.

It judges the shipped model, so it shares nothing with the code that drew the training pictures.
All thresholds are in 8-bit units and hold for pictures of 128 by 128 pixels.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 128

SKY = {
    "day": ((83, 168, 237), (145, 205, 245)),
    "sunset": ((110, 66, 137), (225, 110, 115)),
    "night": ((10, 15, 52), (20, 32, 84)),
    "dawn": ((140, 204, 204), (230, 224, 204)),
}
"""Colours near the top of the sky and halfway down to the horizon, by time of day."""

BOAT_PIXELS = 110
"""Fewest pixels of one paint that make a boat; a boat has 500 to 1500."""
STRIPE_MATCH = 0.75
"""Least correlation of a column with lighthouse stripes."""
STRIPE_MATCH_ON_GREEN = 0.87
"""The same where there is green too: a palm on its island looks a little like stripes."""
STRIPE_CONTRAST = 20.0
"""Least standard deviation of the stripes' redness."""
ISLAND_PIXELS = 25


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where there is no boat or no landmark."""

    time: str
    boat_color: str | None
    landmark: str | None
    landmark_side: str | None


def read_picture(image: np.ndarray) -> Reading:
    """Read a uint8 picture `[128, 128, 3]`; raises ValueError for any other shape or type."""
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [{SIZE}, {SIZE}, 3], got {image.dtype} {list(image.shape)}")
    picture = _smooth(image.astype(np.float32))
    landmark, side = read_landmark(picture)
    return Reading(read_time(picture), read_boat_color(picture), landmark, side)


def read_time(picture: np.ndarray) -> str:
    """Name the time of day whose sky is nearest, from the median colours of two bands of sky."""
    top = np.median(picture[2:12].reshape(-1, 3), axis=0)
    middle = np.median(picture[32:46].reshape(-1, 3), axis=0)
    seen = np.concatenate([top, middle])
    return min(SKY, key=lambda time: float(np.linalg.norm(seen - np.concatenate(SKY[time]))))


def read_boat_color(picture: np.ndarray) -> str | None:
    """Name the paint that covers most of the boat's place, or None where too little is painted."""
    counts = {name: int(mask.sum()) for name, mask in paint_masks(picture).items()}
    best = max((name for name in counts if name != "white"), key=lambda name: counts[name])
    if counts[best] < BOAT_PIXELS and counts["white"] >= BOAT_PIXELS:
        best = "white"
    return best if counts[best] >= BOAT_PIXELS else None


def paint_masks(picture: np.ndarray) -> dict[str, np.ndarray]:
    """Mark, for each paint, the pixels `[128, 128]` of the boat's place that show it.

    A paint must also differ from what lies beside the boat in the same row: sunset skies are reddish, night seas blue.
    """
    r, g, b = np.moveaxis(picture, -1, 0)
    back_r, back_g, back_b = back = np.moveaxis(np.maximum(_background(picture), 1), -1, 0)
    high, low = picture.max(axis=-1), picture.min(axis=-1)
    back_high, back_low = back.max(axis=0), back.min(axis=0)
    red_share = np.minimum(0.46, np.maximum(back_g, back_b) / back_r - 0.08)
    yellow_share = np.minimum(0.44, back_b / np.minimum(back_r, back_g) - 0.1)
    grey = np.where(back_high > 110, 30, np.minimum(30, back_high - back_low - 10))
    masks = {
        "red": (r > 100) & (np.maximum(g, b) < red_share * r),
        "blue": (b - g > np.maximum(84, back_b - back_g + 20)) & (b - r > 84) & (r < 110),
        "green": _green(picture),
        "yellow": (np.minimum(r, g) > 110) & (b < yellow_share * np.minimum(r, g)) & (g > 0.72 * r),
        "black": (high < 84) & (high - low < grey),
        "white": _erode((low > np.maximum(150, back_low + 32)) & (high - low < 46)),
    }
    hull, above = _boat_place()
    return {name: mask & (hull if name == "white" else hull | above) for name, mask in masks.items()}


def read_landmark(picture: np.ndarray) -> tuple[str | None, str | None]:
    """Name the landmark and its side: red and white stripes make a lighthouse, green at a rim an island."""
    stripes = {"left": stripe_score(picture[:, :36]), "right": stripe_score(picture[:, -36:])}
    side = max(stripes, key=lambda name: stripes[name])
    greens = _green(picture[45:83])
    counts = {"left": int(greens[:, :19].sum()), "right": int(greens[:, -19:].sum())}
    if stripes[side] >= (STRIPE_MATCH if counts[side] < ISLAND_PIXELS else STRIPE_MATCH_ON_GREEN):
        return "lighthouse", side
    side = max(counts, key=lambda name: counts[name])
    return ("island", side) if counts[side] >= ISLAND_PIXELS else (None, None)


def stripe_score(strip: np.ndarray) -> float:
    """Find the best correlation of any column of `[128, W, 3]` with five stripes, red first and last."""
    redness = strip[..., 0] - (strip[..., 1] + strip[..., 2]) / 2
    columns = np.stack([redness[:, x : x + 5].mean(axis=1) for x in range(strip.shape[1] - 4)])
    return max(_best_match(columns, length) for length in (40, 43, 46, 49))


def _best_match(columns: np.ndarray, length: int) -> float:
    """Slide the stripe pattern of one length down each column `[N, 128]`; faint columns score 0."""
    stripe = length / 5
    pattern = np.where(np.floor(np.arange(length) / stripe).astype(int) % 2 == 0, 1.0, -1.0)
    pattern = np.convolve(np.pad(pattern, 2, mode="edge"), np.ones(5) / 5, mode="valid")
    pattern = (pattern - pattern.mean()) / pattern.std()
    windows = np.lib.stride_tricks.sliding_window_view(columns[:, 16:96], length, axis=1)
    centered = windows - windows.mean(axis=-1, keepdims=True)
    spread = centered.std(axis=-1)
    match = (centered @ pattern) / length / np.maximum(spread, 1e-6)
    return float(np.where(spread >= STRIPE_CONTRAST, match, 0.0).max())


def _boat_place() -> tuple[np.ndarray, np.ndarray]:
    """Mark where a hull lies, below every landmark, and where sails and cabins stand, between them."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    hull = (rows >= 86) & (rows < 106) & (columns >= 18) & (columns < 110)
    above = (rows >= 48) & (rows < 86) & (columns >= 46) & (columns < 82)
    return hull, above


def _background(picture: np.ndarray) -> np.ndarray:
    """Take each row's usual colour beside the boat, `[128, 1, 3]`."""
    beside = np.concatenate([picture[:, :40], picture[:, 88:]], axis=1)
    return np.median(beside, axis=1, keepdims=True)


def _green(picture: np.ndarray) -> np.ndarray:
    """Mark the pixels of `[H, W, 3]` that are greener than any water."""
    others = np.maximum(picture[..., 0], picture[..., 2])
    return (picture[..., 1] > 1.22 * others) & (picture[..., 1] - others > 13)


def _smooth(picture: np.ndarray) -> np.ndarray:
    """Average each pixel of `[H, W, 3]` with its eight neighbours."""
    height, width, _ = picture.shape
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = sum(padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3))
    return np.asarray(total) / 9


def _erode(mask: np.ndarray) -> np.ndarray:
    """Keep the pixels of `[H, W]` whose upper and lower neighbours are set too, so thin lines vanish."""
    padded = np.pad(mask, ((1, 1), (0, 0)))
    return padded[:-2] & padded[1:-1] & padded[2:]
