"""Brush strokes of the seascapes: boats, landmarks, clouds and waves, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

BOAT_PAINT: dict[str, Color] = {
    "red": (218, 40, 44),
    "blue": (36, 76, 222),
    "green": (34, 158, 66),
    "yellow": (252, 208, 36),
    "white": (248, 248, 246),
    "black": (30, 30, 36),
}


def mix(first: Color, second: Color, share: float) -> Color:
    """Blend two colours; `share` is how much of the second."""
    r, g, b = (round(a + (c - a) * share) for a, c in zip(first, second, strict=True))
    return r, g, b


@dataclass(frozen=True)
class Pen:
    """Draws in a sprite's own units: x to its bow, y down from its waterline, in picture pixels."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    scale: float
    flip: bool = False
    tilt: float = 0.0

    def place(self, points: Points) -> list[tuple[float, float]]:
        """Map sprite points to canvas points."""
        cos, sin = math.cos(self.tilt) * self.scale, math.sin(self.tilt) * self.scale
        sign = -1.0 if self.flip else 1.0
        return [(self.x + sign * px * cos - py * sin, self.y + sign * px * sin + py * cos) for px, py in points]

    def fill(self, points: Points, color: tuple[int, ...], rim: Color | None = None, width: float = 0.9) -> None:
        """Fill a polygon, with a rim line if asked."""
        placed = self.place(points)
        self.draw.polygon(placed, fill=color)
        if rim is not None:
            self.draw.line([*placed, placed[0], placed[1]], fill=rim, width=self._px(width), joint="curve")

    def line(self, points: Points, color: tuple[int, ...], width: float) -> None:
        """Stroke a polyline."""
        self.draw.line(self.place(points), fill=color, width=self._px(width), joint="curve")

    def dot(self, x: float, y: float, radius: float, color: tuple[int, ...]) -> None:
        """Fill a disc."""
        ((cx, cy),) = self.place([(x, y)])
        r = radius * self.scale
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=color)

    def _px(self, width: float) -> int:
        return max(1, round(width * self.scale))


@dataclass(frozen=True)
class Paint:
    """The tones of one boat."""

    body: Color
    light: Color
    dark: Color
    rim: Color
    trim: Color
    wood: Color
    glass: Color


def boat_paint(name: str, night: bool, rng: np.random.Generator) -> Paint:
    """Mix the tones of a boat; by night they are a little dimmer and the windows are lit."""
    jitter = rng.integers(-8, 9, 3)
    r, g, b = (int(np.clip(c + j, 0, 255)) for c, j in zip(BOAT_PAINT[name], jitter, strict=True))
    base: Color = (r, g, b)
    shade = {"white": (150, 165, 190), "black": (0, 0, 0)}.get(name, (20, 16, 40))
    light = mix(base, (255, 255, 255), {"black": 0.1, "yellow": 0.3, "white": 0.0}.get(name, 0.16))
    rim = {"white": (104, 118, 146), "black": (176, 182, 196)}.get(name, mix(base, (16, 10, 30), 0.6))
    trim: Color = (120, 140, 170) if name == "white" else (244, 242, 236)
    tones = (base, light, mix(base, shade, 0.28), rim, trim, (104, 70, 46))
    dim = tuple(mix(tone, (10, 16, 50), 0.16) if night else tone for tone in tones)
    glass: Color = (255, 226, 130) if night else (206, 234, 246)
    return Paint(*dim, glass=glass)


def draw_boat(pen: Pen, kind: str, paint: Paint) -> None:
    """Draw a boat of one of the three kinds."""
    {"sailboat": _sailboat, "fishing boat": _fishing_boat, "steamship": _steamship}[kind](pen, paint)


def _bow(start: tuple[float, float], bulge: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Sample a quadratic Bezier curve at seven points."""
    curve = []
    for step in range(7):
        t = step / 6
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        curve.append((a * start[0] + b * bulge[0] + c * end[0], a * start[1] + b * bulge[1] + c * end[1]))
    return curve


def _sailboat(pen: Pen, paint: Paint) -> None:
    pen.line([(-1, -8), (-1, -53)], paint.wood, 2.0)
    main = [(-3, -50), *_bow((-3, -50), (-26, -30), (-24, -13)), *_bow((-24, -13), (-12, -10), (-3, -12))]
    pen.fill(main, paint.body, paint.rim)
    pen.fill([(-3, -49), *_bow((-3, -49), (-13, -30), (-12, -12)), (-3, -12)], paint.light)
    pen.line([*main, main[0]], paint.rim, 0.9)
    jib = [(1.5, -46), *_bow((1.5, -46), (18, -28), (22, -13)), *_bow((22, -13), (10, -10), (1.5, -13))]
    pen.fill(jib, paint.dark, paint.rim)
    pen.fill([(-1, -53), (8, -50.5), (-1, -48)], paint.body, paint.rim, 0.6)
    hull = [(-25, -9), (27, -9), *_bow((27, -9), (22, 3), (14, 5)), (-18, 5), *_bow((-18, 5), (-24, 1), (-25, -9))]
    pen.fill(hull, paint.body, paint.rim)
    pen.fill([(-24.2, -6.4), (25.4, -6.4), (24, -3.6), (-23.6, -3.6)], paint.trim)


def _fishing_boat(pen: Pen, paint: Paint) -> None:
    pen.line([(6, -12), (6, -40)], paint.wood, 1.8)
    pen.line([(6, -36), (25, -17)], paint.rim, 0.9)
    pen.line([(6, -36), (-26, -14)], paint.rim, 0.9)
    pen.fill([(6, -40), (15, -37.5), (6, -35)], paint.body, paint.rim, 0.6)
    cabin = [(-17, -10), (-16, -29), (1, -29), (3, -10)]
    pen.fill(cabin, paint.light, paint.rim)
    pen.fill([(-19, -29), (-18, -32.5), (3, -32.5), (4, -29)], paint.dark, paint.rim)
    for x in (-14.2, -6.2):
        pen.fill([(x, -26), (x + 5.8, -26), (x + 5.8, -19.5), (x, -19.5)], paint.glass, paint.rim, 0.7)
    hull = [(-28, -12), (6, -11), *_bow((6, -11), (20, -12), (31, -19)), *_bow((31, -19), (27, 2), (18, 5))]
    pen.fill([*hull, (-20, 5), *_bow((-20, 5), (-27, 2), (-28, -12))], paint.body, paint.rim)
    pen.fill([(-27.6, -9.5), (8, -8.5), (29.6, -14.5), (29, -11.6), (8, -5.6), (-27.2, -6.6)], paint.trim)


def _steamship(pen: Pen, paint: Paint) -> None:
    smoke = mix((236, 236, 240), paint.rim, 0.2)
    for x, y, r in ((-8, -43, 3.2), (-13, -47, 4.2), (-20, -50, 5.2)):
        pen.dot(x, y, r, (*smoke, 190))
    for x in (-9.5, 4.5):
        pen.fill([(x, -20), (x + 0.5, -39), (x + 8, -39), (x + 8.5, -20)], paint.body, paint.rim)
        pen.fill([(x + 0.5, -35.5), (x + 8.1, -35.5), (x + 8.2, -32), (x + 0.4, -32)], paint.trim)
    pen.fill([(-19, -10), (-18, -25), (17, -25), (20, -10)], paint.light, paint.rim)
    for x in (-14, -6, 2, 10):
        pen.fill([(x, -22), (x + 4.6, -22), (x + 4.6, -17), (x, -17)], paint.glass, paint.rim, 0.6)
    hull = [(-31, -13), (20, -12), (34, -16), *_bow((34, -16), (30, 2), (24, 5))]
    pen.fill([*hull, (-22, 5), *_bow((-22, 5), (-30, 2), (-31, -13))], paint.body, paint.rim)
    pen.fill([(-30.6, -9.8), (20, -8.8), (32.8, -11.6), (32, -8.6), (20, -5.8), (-30, -6.8)], paint.trim)


def draw_lighthouse(pen: Pen, time: str, tone: float) -> None:
    """Draw a striped lighthouse on its rock, 58 units tall, with a beam by night; `tone` dims it (0 to 1)."""
    shadow: Color = (24, 26, 62)
    white, red = mix((250, 247, 240), shadow, tone), mix((206, 44, 48), shadow, tone)
    rock, rim = mix((120, 108, 104), shadow, tone), mix((70, 56, 66), shadow, tone)
    lit = time in ("night", "sunset")
    if time == "night":
        pen.fill([(0, -51.5), (140, -84), (140, -36)], (255, 240, 170, 46))
        pen.fill([(0, -51.5), (140, -70), (140, -48)], (255, 240, 170, 44))
    tower = [(-7.5, -3), (-4.6, -47), (4.6, -47), (7.5, -3)]
    pen.fill(tower, white, rim)
    for low, high in ((-3, -12), (-21, -30), (-39, -47)):
        left, right = 7.5 + (low + 3) * 2.9 / 44, 7.5 + (high + 3) * 2.9 / 44
        pen.fill([(-left, low), (-right, high), (right, high), (left, low)], red)
    pen.fill([(1.8, -3), (1.2, -47), (4.6, -47), (7.5, -3)], (*shadow, 44))
    pen.line([*tower, tower[0]], rim, 0.8)
    pen.fill([(-3.6, -48), (-3.6, -54.5), (3.6, -54.5), (3.6, -48)], (255, 232, 120) if lit else (214, 236, 244), rim)
    pen.fill([(-6.4, -46.5), (-6.4, -48.6), (6.4, -48.6), (6.4, -46.5)], rim)
    pen.fill([(-4.8, -54), (0, -59.5), (4.8, -54)], red, rim)
    if time == "night":
        pen.dot(0, -51.5, 7, (255, 240, 170, 80))
    stone = [(-17, 5), (-14, -2), (-8, -6), (-1, -4.5), (6, -7), (12, -2), (17, 5)]
    pen.fill(stone, rock, rim)
    pen.fill([(-12, -1.5), (-8, -4.8), (-2, -3), (-6, 0)], mix(rock, (255, 255, 255), 0.2))


def draw_island(pen: Pen, tone: float) -> None:
    """Draw a green island with a sand rim and a palm tree, 46 units wide; `tone` dims it (0 to 1)."""
    shadow: Color = (24, 26, 62)
    sand, grass = mix((240, 214, 150), shadow, tone), mix((84, 160, 84), shadow, tone)
    leaf, wood = mix((40, 124, 66), shadow, tone), mix((128, 88, 58), shadow, tone)
    pen.fill([(-24, 4), *_bow((-24, 4), (-14, -7), (0, -7)), *_bow((0, -7), (15, -7), (24, 4))], sand)
    pen.fill([(-17, -1), *_bow((-17, -1), (-8, -15), (2, -13)), *_bow((2, -13), (12, -12), (17, -1))], grass)
    pen.line([*_bow((3, -11), (2, -22), (-3, -34))], wood, 2.6)
    for x, y, lift in ((-16, -32, -7), (-14, -24, -5), (10, -34, -8), (9, -25, -6), (-6, -44, 0)):
        bend = ((x - 3) / 2, min(y, -34) + lift)
        inner = (bend[0] * 0.9, bend[1] + 5.5)
        pen.fill([*_bow((-3, -35), bend, (x, y)), *_bow((x, y), inner, (-3, -33))], leaf)
    pen.dot(-2.2, -32, 1.7, mix((120, 70, 40), shadow, tone))


def draw_cloud(pen: Pen, color: Color, shade: Color, bumps: Sequence[tuple[float, float, float]]) -> None:
    """Draw a puffy cloud with a flat shaded foot; each bump is (x, y, radius)."""
    for x, y, r in bumps:
        pen.dot(x, y + 1.6, r, shade)
    for x, y, r in bumps:
        pen.dot(x, y - 0.4, r * 0.94, color)


def draw_bird(pen: Pen, color: Color) -> None:
    """Draw a gull as a little v."""
    pen.line([(-5, -2.2), (-2.6, -3), (0, 0), (2.6, -3), (5, -2.2)], color, 1.3)


def draw_star(pen: Pen) -> None:
    """Draw a four-pointed star of about four units."""
    pen.fill(
        [(0, -2.2), (0.6, -0.6), (2.2, 0), (0.6, 0.6), (0, 2.2), (-0.6, 0.6), (-2.2, 0), (-0.6, -0.6)], (255, 250, 216)
    )
