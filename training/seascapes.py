"""Picture-book seascapes with captions, rendered from a description: the shipped model's training data.

`python -m training.seascapes out.png` writes a sheet of examples and prints their captions.
"""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from training.drawing import (
    Color,
    Pen,
    boat_paint,
    draw_bird,
    draw_boat,
    draw_cloud,
    draw_island,
    draw_lighthouse,
    draw_star,
    mix,
)
from training.scene import Scene, caption, sample_scene, vocabulary

__all__ = ["Scene", "caption", "dataset", "render", "sample_scene", "vocabulary"]

UNITS = 128
"""Width and height of a picture in the units that all drawing uses."""
OVERSAMPLING = 3


@dataclass(frozen=True)
class Palette:
    """The colours of a time of day; sky stops run from the top to the horizon, sea stops on to the bottom."""

    sky: tuple[Color, Color, Color]
    sea: tuple[Color, Color]
    glow: Color
    body: Color
    cloud: Color
    cloud_shade: Color
    glint: Color
    bird: Color
    dim: float


PALETTES = {
    "day": Palette(
        ((74, 164, 236), (142, 204, 246), (216, 240, 252)), ((88, 182, 214), (26, 108, 176)),
        (255, 255, 244), (255, 226, 92), (255, 255, 255), (208, 226, 242), (226, 246, 252), (70, 84, 110), 0.0,
    ),
    "sunset": Palette(
        ((96, 62, 140), (226, 98, 118), (255, 178, 84)), ((226, 120, 96), (82, 52, 116)),
        (255, 206, 110), (255, 232, 130), (244, 148, 140), (186, 96, 134), (255, 206, 140), (74, 36, 78), 0.16,
    ),
    "night": Palette(
        ((8, 12, 46), (18, 30, 82), (44, 70, 132)), ((34, 60, 116), (8, 16, 52)),
        (96, 126, 186), (248, 246, 222), (70, 84, 132), (46, 58, 104), (196, 208, 226), (20, 24, 50), 0.3,
    ),
    "dawn": Palette(
        ((126, 200, 204), (232, 226, 204), (255, 206, 190)), ((198, 212, 206), (86, 158, 166)),
        (255, 236, 176), (255, 224, 120), (255, 240, 228), (240, 204, 198), (255, 246, 224), (108, 104, 122), 0.03,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where things stand in a picture, in units of a 128th of its width."""

    horizon: float
    boat_x: float
    boat_y: float
    boat_scale: float
    boat_flip: bool
    boat_tilt: float
    landmark_x: float
    landmark_scale: float
    body_x: float
    body_y: float
    body_radius: float


@dataclass(frozen=True)
class Canvas:
    """What every brush stroke needs; `unit` is the length of one unit in oversampled pixels."""

    draw: ImageDraw.ImageDraw
    unit: float
    scene: Scene
    palette: Palette
    layout: Layout
    rng: np.random.Generator

    def pen(self, x: float, y: float, scale: float, flip: bool = False) -> Pen:
        """Hold a pen at a point, all lengths in units."""
        return Pen(self.draw, x * self.unit, y * self.unit, self.unit * scale, flip)


def render(scene: Scene, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """Paint a scene as uint8 `[size, size, 3]`; `rng` moves and tints things a little."""
    palette, layout = _jitter(PALETTES[scene.time], scene.sea, rng), _layout(scene, rng)
    base = Image.fromarray(_backdrop(scene, palette, layout))
    image = base.resize((OVERSAMPLING * size, OVERSAMPLING * size), Image.Resampling.BILINEAR)
    canvas = Canvas(ImageDraw.Draw(image, "RGBA"), OVERSAMPLING * size / UNITS, scene, palette, layout, rng)
    _draw_sky(canvas)
    _draw_landmark(canvas)
    _draw_sea(canvas)
    return np.asarray(image.reduce(OVERSAMPLING))


def dataset(count: int, seed: int, size: int = 128, start: int = 0) -> tuple[np.ndarray, list[str]]:
    """Make samples `start` to `start + count` as uint8 `[count, size, size, 3]` and captions; each has its own seed."""
    images, captions = np.empty((count, size, size, 3), np.uint8), []
    for row in range(count):
        rng = np.random.default_rng((seed, start + row))
        scene = sample_scene(rng)
        images[row] = render(scene, rng, size)
        captions.append(caption(scene, rng))
    return images, captions


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Lay pictures `[N, H, W, 3]` side by side with a thin white border."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + 4) + 4), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        page.paste(Image.fromarray(image), (4 + column * (width + 4), 4 + row * (height + 4)))
    return page


def _jitter(palette: Palette, sea: str, rng: np.random.Generator) -> Palette:
    shift = rng.integers(-6, 7, (4, 3))

    def moved(color: Color, row: int) -> Color:
        r, g, b = (int(np.clip(c + d, 0, 255)) for c, d in zip(color, shift[row], strict=True))
        return r, g, b

    heavy = 0.22 if sea == "rough" else 0.0
    top, middle, low = (moved(color, row) for row, color in enumerate(palette.sky))
    far, near = (mix(moved(color, 3), (24, 44, 70), heavy) for color in palette.sea)
    return replace(palette, sky=(top, middle, low), sea=(far, near))


def _layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """Place the boat away from the landmark, and the sun or moon away from both."""
    right = scene.side == "right"
    shift = float(rng.uniform(-1, 1))
    boat_x = 64 + 15 * shift
    if scene.landmark != "none":
        boat_x = 64 + (11 + 5 * shift) * (-1 if right else 1)
    edge = rng.uniform(14, 20) if scene.landmark == "lighthouse" else rng.uniform(20, 26)
    body_right = not right if scene.landmark != "none" else boat_x < 64
    low = scene.time in ("sunset", "dawn")
    reach = float(rng.uniform(13, 20) if low or scene.boat_kind != "none" else rng.uniform(18, 44))
    horizon = float(rng.uniform(74, 80))
    radius = float(rng.uniform(9, 11))
    rough = scene.sea == "rough"
    return Layout(
        horizon=horizon,
        boat_x=boat_x,
        boat_y=float(rng.uniform(96, 102)),
        boat_scale=float(rng.uniform(0.98, 1.14)),
        boat_flip=bool(rng.random() < 0.5),
        boat_tilt=float(rng.choice((-1, 1)) * rng.uniform(0.06, 0.15)) if rough else float(rng.uniform(-0.025, 0.025)),
        landmark_x=UNITS - edge if right else edge,
        landmark_scale=float(rng.uniform(0.96, 1.1)),
        body_x=UNITS - reach if body_right else reach,
        body_y=horizon - rng.uniform(0, 0.6) * radius if low else float(rng.uniform(18, 26)),
        body_radius=radius,
    )


def _backdrop(scene: Scene, palette: Palette, layout: Layout) -> np.ndarray:
    """Paint sky and sea gradients, the horizon's glow, the halo and its path on the water, `[128, 128, 3]`."""
    y, x = np.arange(UNITS, dtype=np.float32) + 0.5, np.arange(UNITS, dtype=np.float32) + 0.5
    horizon = layout.horizon
    stops = (0.0, 0.55 * horizon, horizon - 0.01, horizon + 0.01, float(UNITS))
    colors = np.array([*palette.sky, *palette.sea], np.float32)
    column = np.stack([np.interp(y, stops, colors[:, c]) for c in range(3)], axis=1)
    glow = 0.45 * np.exp(-np.abs(y - horizon) / np.where(y < horizon, 9.0, 4.0))[:, None]
    column += (np.array(palette.glow, np.float32) - column) * glow
    picture = np.repeat(column[:, None], UNITS, axis=1)
    if scene.sky_body != "none":
        _shine(picture, palette, layout, x, y)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _shine(picture: np.ndarray, palette: Palette, layout: Layout, x: np.ndarray, y: np.ndarray) -> None:
    """Blend the halo in the sky and the path on the water into `[128, 128, 3]`, in place."""
    dx, dy = x[None, :] - layout.body_x, y[:, None] - layout.body_y
    halo = 0.75 * np.exp(-np.maximum(np.sqrt(dx * dx + dy * dy) - layout.body_radius, 0) / 9.0)
    below = y[:, None] > layout.horizon
    depth = np.maximum(y[:, None] - layout.horizon, 0)
    path = 0.6 * np.exp(-((dx / (7 + 0.16 * depth)) ** 2)) * np.exp(-depth / 46)
    weight = np.where(below, path, halo)[..., None].astype(np.float32)
    picture += (np.array(mix(palette.body, palette.glow, 0.4), np.float32) - picture) * weight


def _draw_sky(canvas: Canvas) -> None:
    scene, rng = canvas.scene, canvas.rng
    if scene.stars:
        for index in range(int(rng.integers(9, 14))):
            x, y = (index * 47 + rng.uniform(-8, 8)) % UNITS, (index * 29 + rng.uniform(-6, 6)) % 58 + 4
            draw_star(canvas.pen(x, y, rng.uniform(0.7, 1.05)))
    if scene.sky_body != "none":
        _draw_body(canvas)
    if scene.clouds:
        _draw_clouds(canvas)
    if scene.birds:
        x, y = float(rng.uniform(40, 80)), float(rng.uniform(22, 34))
        for dx, dy, scale in ((0, 0, 1.1), (14, -6, 0.9), (-13, -4, 0.8))[: int(rng.integers(2, 4))]:
            draw_bird(canvas.pen(x + dx, y + dy, scale), canvas.palette.bird)


def _draw_body(canvas: Canvas) -> None:
    """Draw the sun or the moon; a low sun is cut by the horizon."""
    layout, color = canvas.layout, canvas.palette.body
    x, y, r = (canvas.unit * value for value in (layout.body_x, layout.body_y, layout.body_radius))
    cut = math.degrees(math.asin(np.clip((layout.horizon - layout.body_y) / layout.body_radius, -1, 1)))
    canvas.draw.chord((x - r, y - r, x + r, y + r), 180 - cut, 360 + cut, fill=color)
    if canvas.scene.sky_body == "moon":
        pen = canvas.pen(layout.body_x, layout.body_y, layout.body_radius)
        for cx, cy, cr in ((-0.3, -0.25, 0.24), (0.35, 0.2, 0.3), (-0.2, 0.5, 0.16)):
            pen.dot(cx, cy, cr, mix(color, (150, 150, 160), 0.35))


def _draw_clouds(canvas: Canvas) -> None:
    """Draw two or three clouds, none of them over the sun or moon."""
    layout, rng = canvas.layout, canvas.rng
    has_body = canvas.scene.sky_body != "none"
    for center in rng.permutation((24, 64, 104))[: int(rng.integers(2, 4))]:
        x, y = center + rng.uniform(-12, 12), rng.uniform(9, 40)
        if has_body and abs(x - layout.body_x) < 26 and abs(y - layout.body_y) < 20:
            x = layout.body_x + math.copysign(rng.uniform(27, 32), 64 - layout.body_x)
        pen = canvas.pen(x, y, rng.uniform(0.8, 1.2))
        left, middle, size = rng.uniform(0.85, 1.15, 3)
        tops = ((-9, 0, 4.2), (-4, -2.6 * left, 5.4), (3, -3.2 * middle, 6.2 * size))
        draw_cloud(pen, canvas.palette.cloud, canvas.palette.cloud_shade, (*tops, (9, -0.4, 4.6), (0, 0.6, 4)))


def _draw_landmark(canvas: Canvas) -> None:
    scene, layout, dim = canvas.scene, canvas.layout, canvas.palette.dim
    if scene.landmark == "none":
        return
    pen = canvas.pen(layout.landmark_x, layout.horizon + 4, layout.landmark_scale, flip=scene.side == "right")
    if scene.landmark == "lighthouse":
        draw_lighthouse(pen, scene.time, dim)
    else:
        draw_island(pen, dim)


def _draw_sea(canvas: Canvas) -> None:
    """Draw wave bands from the horizon to the viewer, the sun's glints and the boat between them."""
    scene, layout = canvas.scene, canvas.layout
    for index, y in enumerate((layout.horizon + 5.5, layout.horizon + 13, layout.boat_y - 1, 112.0, 121.0)):
        if index == 2 and scene.sky_body != "none":
            _draw_glints(canvas)
        if index == 3 and scene.boat_kind != "none":
            _draw_boat(canvas)
        _draw_wave(canvas, y + 3 * (index == 3 and scene.sea == "rough"), index)


def _draw_glints(canvas: Canvas) -> None:
    """Draw the broken reflection of sun or moon, wider towards the viewer."""
    layout = canvas.layout
    color = mix(canvas.palette.body, canvas.palette.glint, 0.3)
    for index in range(6):
        depth = 2.0 + 1.5 * index + 1.1 * index * index
        x, y = layout.body_x + canvas.rng.uniform(-2, 2), layout.horizon + depth
        reach, thick = 6.0 + 0.9 * index, 0.7 + 0.14 * index
        box = [canvas.unit * edge for edge in (x - reach, y - thick, x + reach, y + thick)]
        canvas.draw.ellipse(box, fill=(*color, 170 - 12 * index))


def _draw_wave(canvas: Canvas, y: float, index: int) -> None:
    """Draw one band of water: gentle swell when calm, pointed crests with foam when rough."""
    x = np.linspace(0, UNITS, 65)
    phase, share, rough = canvas.rng.uniform(0, 2 * math.pi), index / 4, canvas.scene.sea == "rough"
    if rough:
        crest = y + (2.4 + 2.6 * share) * (2 * np.abs(np.sin(x * (0.115 - 0.045 * share) + phase)) - 1.2)
    else:
        crest = y + (0.4 + 0.5 * share) * np.sin(x * (0.16 - 0.07 * share) + phase)
    unit, (far, near) = canvas.unit, canvas.palette.sea
    top = [(float(a) * unit, float(b) * unit) for a, b in zip(x, crest, strict=True)]
    deep = mix(far, near, 0.35 + 0.65 * share)
    edge = mix(deep, canvas.palette.glint, 0.8 if rough else 0.45)
    canvas.draw.polygon([*top, (UNITS * unit,) * 2, (0, UNITS * unit)], fill=(*deep, 132 if rough else 84))
    width = round(unit * (1.0 + share if rough else 0.9))
    canvas.draw.line(top, fill=(*edge, 220 if rough else 110), width=width)


def _draw_boat(canvas: Canvas) -> None:
    """Draw the boat with its shadow below and foam along its foot."""
    layout, palette = canvas.layout, canvas.palette
    x, y, scale = (canvas.unit * value for value in (layout.boat_x, layout.boat_y, layout.boat_scale))
    shadow = mix(palette.sea[1], (0, 0, 20), 0.4)
    for reach, alpha in ((30, 60), (24, 70)):
        box = (x - reach * scale, y + 0.5 * scale, x + reach * scale, y + 9 * scale)
        canvas.draw.ellipse(box, fill=(*shadow, alpha))
    paint = boat_paint(canvas.scene.boat_color, canvas.scene.time == "night", canvas.rng)
    draw_boat(Pen(canvas.draw, x, y, scale, layout.boat_flip, layout.boat_tilt), canvas.scene.boat_kind, paint)
    foam = mix(palette.glint, palette.sea[0], 0.2)
    bow = -1 if layout.boat_flip else 1
    for dx, reach, thick in ((-21, 4, 1.0), (-13, 6, 1.3), (-2, 7, 1.1), (9, 6, 1.5), (18, 6, 1.8), (25, 3.5, 1.1)):
        cx, cy = x + bow * dx * scale, y + 5 * scale
        box = (cx - reach * scale, cy - thick * scale, cx + reach * scale, cy + 1.1 * scale)
        canvas.draw.ellipse(box, fill=(*foam, 165))


def main(path: str) -> None:
    """Write a sheet of 48 examples and print their captions."""
    images, captions = dataset(48, seed=0)
    sheet(images, columns=8).save(path)
    print("\n".join(f"{index:2d}  {text}" for index, text in enumerate(captions)))


if __name__ == "__main__":
    main(sys.argv[1])
