"""Where the labels of a plot go so that each can be read: pure arithmetic, in points of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_DISTANCES = (6.0, 14.0, 26.0, 42.0, 62.0, 86.0, 115.0, 150.0)
_DIRECTIONS = 16
_ROUNDS = 4
_DOT = 5.0  # half the side of a dot's square, with a margin


@dataclass(frozen=True)
class Box:
    """A rectangle by two corners."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """The area that both boxes cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.right - self.left) * (self.top - self.bottom)


Point = tuple[float, float]
Label = tuple[Point, Box]


def placed(anchors: Sequence[Point], sizes: Sequence[Point], page: Box) -> list[Box]:
    """A box of the given (width, height) for each anchor: near it, on the page, and on no other box, dot or lead.

    Each label in turn takes the place that costs least, given where the others are; this is repeated for a few rounds.
    """
    options = [list(_places(anchor, size)) for anchor, size in zip(anchors, sizes, strict=True)]
    chosen = [places[0] for places in options]
    for _ in range(_ROUNDS):
        before = list(chosen)
        for index, places in enumerate(options):
            others = [(anchors[i], box) for i, box in enumerate(chosen) if i != index]
            chosen[index] = _cheapest(places, anchors[index], others, page)
        if chosen == before:
            break
    return chosen


def _cheapest(places: Sequence[Box], anchor: Point, others: Sequence[Label], page: Box) -> Box:
    best, least = places[0], math.inf
    for place in places:
        cost = _cost(place, anchor, others, page, least)
        if cost < least:
            best, least = place, cost
    return best


def _places(anchor: Point, size: Point) -> Iterator[Box]:
    """Boxes around the anchor, the nearest first."""
    for distance in _DISTANCES:
        for number in range(_DIRECTIONS):
            angle = 2 * math.pi * number / _DIRECTIONS
            x = anchor[0] + distance * math.cos(angle) + (math.cos(angle) - 1) / 2 * size[0]
            y = anchor[1] + distance * math.sin(angle) + (math.sin(angle) - 1) / 2 * size[1]
            yield Box(x, y, x + size[0], y + size[1])


def _cost(place: Box, anchor: Point, others: Sequence[Label], page: Box, limit: float) -> float:
    """The cost of a place: its distance, its area off the page, what it covers or crosses; exact only below `limit`."""
    lead = (anchor, place.nearest(*anchor))
    cost = math.dist(*lead) + 50 * (place.area - place.shared(page))
    for point, box in others:
        if cost >= limit:
            break
        dot = Box(point[0] - _DOT, point[1] - _DOT, point[0] + _DOT, point[1] + _DOT)
        other_lead = (point, box.nearest(*point))
        cost += 8 * place.shared(box) + 5 * place.shared(dot)
        cost += 40 * (_meets(lead, box) + _meets(other_lead, place)) + 25 * _cross(lead, other_lead)
    return cost


def _meets(line: tuple[Point, Point], box: Box) -> bool:
    """Whether a line goes through a box: both of its coordinates are inside at the same time."""
    (x0, y0), (x1, y1) = line
    begin, end = 0.0, 1.0
    for start, change, low, high in ((x0, x1 - x0, box.left, box.right), (y0, y1 - y0, box.bottom, box.top)):
        if change == 0:
            if not low < start < high:
                return False
            continue
        enters, leaves = sorted(((low - start) / change, (high - start) / change))
        begin, end = max(begin, enters), min(end, leaves)
    return begin < end


def _cross(line: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    return _side(*line, other[0]) * _side(*line, other[1]) < 0 and _side(*other, line[0]) * _side(*other, line[1]) < 0


def _side(start: Point, end: Point, point: Point) -> float:
    """Positive where `point` is on the left of the line."""
    return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])
