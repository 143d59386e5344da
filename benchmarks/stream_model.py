"""How close to its bound a step comes while weights stream: a queue model of copies beside computing.

    python benchmarks/stream_model.py

The bound is the longer of copying all that streams and computing all of it; the model is that of the planner
(`lowtide.planning.copy_queue`), with one queue of copies and so many bytes to copy into. Nothing runs: units and
operations come from published configurations (`stream_shapes.py`), rates from the table below. Seconds of computing are
operations over one rate, which leaves out that small kernels reach less of it; each copy takes 10 µs to begin. SD 1.5
makes a picture of 512², SDXL and FLUX of 1024², Wan a clip of 81 frames of 832 x 480. Writes markdown to
`benchmarks/results/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowtide.memory.bounds import places, spread
from lowtide.planning.copy_queue import Turn, behind_by_place, behind_in_ring, step_seconds
from lowtide.planning.residents import in_step
from stream_shapes import SHAPES, Block

RESULTS = Path(__file__).parent / "results"
CARDS = {"PCIe 3": (12e9, 4e13), "PCIe 4": (24e9, 1.0e14), "PCIe 5": (48e9, 1.6e14)}
"""Bytes a second over the link, as pinned copies reach them, and operations a second of 16-bit products, as networks
reach them: of a card of 2018, of 2022 and of 2025."""
SHARES = (0.0, 0.25, 0.5, 0.75)
BEGIN = 1e-5
"""Seconds that a copy takes to begin."""
SPEEDS = [2 ** (power / 4) for power in range(-8, 9)]
"""Of computing, over that of the card: what it does not have, another may."""
Choose = Callable[[list[Block], list[float], list[float], int], list[int]]


@dataclass(frozen=True)
class Way:
    """How weights come: at most `units` of them at once, or as many as find room in `largest` times the largest; those
    that `choose` gives stay.
    """

    name: str
    choose: Choose
    units: int = 0
    largest: float = 0.0


def evenly(units: list[Block], copies: list[float], computes: list[float], budget: int) -> list[int]:
    return spread([unit.nbytes for unit in units], budget)


def choose_in_step(units: list[Block], copies: list[float], computes: list[float], budget: int) -> list[int]:
    return in_step([unit.nbytes for unit in units], computes, budget)


TODAY = Way("1 unit ahead", evenly, units=2)
WAYS = (
    TODAY,
    Way("2 units ahead", evenly, units=3),
    Way("as many bytes as 1 unit ahead takes", evenly, largest=2),
    Way("as many bytes as 2 units ahead take", evenly, largest=3),
    Way("1 unit ahead, residents in step", choose_in_step, units=2),
    Way("as many bytes as 1 unit ahead takes, residents in step", choose_in_step, largest=2),
    Way("as many bytes as 2 units ahead take, residents in step", choose_in_step, largest=3),
)
GOAL = 1.10
"""Of seconds over the bound."""


@dataclass(frozen=True)
class Step:
    """What the model says of a step: `seconds`, the `bound`, and the bytes that weights are copied into."""

    seconds: float
    bound: float
    room: int

    @property
    def ratio(self) -> float:
        """Seconds over the bound."""
        return self.seconds / self.bound


def step(units: list[Block], card: str, share: float, way: Way, speed: float = 1.0) -> Step:
    """Of a network on a card, with a share of its weights resident."""
    link, rate = CARDS[card]
    copies = [BEGIN + unit.nbytes / link for unit in units]
    computes = [unit.operations / rate / speed for unit in units]
    staying = set(way.choose(units, copies, computes, int(share * sum(unit.nbytes for unit in units))))
    streaming = [place for place in range(len(units)) if place not in staying]
    sizes = [units[place].nbytes for place in streaming]
    room = int(way.largest * max(sizes)) if way.largest else way.units * max(sizes)
    behind = behind_by_place(places(sizes, room), sizes) if way.largest else behind_in_ring(len(sizes), way.units)
    ends = [*streaming[1:], len(units)]
    turns = [
        Turn(copies[place], computes[place], sum(computes[place + 1 : end]), back)
        for place, end, back in zip(streaming, ends, behind, strict=True)
    ]
    seconds = step_seconds(turns, sum(computes[: streaming[0]]))
    return Step(seconds, max(sum(copies[place] for place in streaming), sum(computes)), room)


def main() -> None:
    text = report({name: list(units()) for name, units in SHAPES.items()})
    print(text)
    (RESULTS / "stream_model.md").write_text(text, encoding="utf-8")


def report(networks: dict[str, list[Block]]) -> str:
    """The tables, and what is to be said of them."""
    cells = {
        (name, way): [step(units, card, share, way) for card in CARDS for share in SHARES]
        for name, units in networks.items()
        for way in WAYS
    }
    kept = {way: sum(one.ratio <= GOAL for name in networks for one in cells[name, way]) for way in WAYS}
    count = len(networks) * len(CARDS) * len(SHARES)
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    speeds = "; ".join(
        f"{card}: {link / 1e9:.0f} GB/s, {rate / 1e12:.0f} TFLOP/s" for card, (link, rate) in CARDS.items()
    )
    lines = [
        f"# Stream model: {kept[WAYS[-1]]} of {count} steps within {GOAL:.2f}, {kept[TODAY]} with 1 unit ahead",
        "",
        f"{about} {speeds}. `python benchmarks/stream_model.py`.",
        "",
        "## Seconds of a step over its bound",
        "",
        f"In each cell {', '.join(f'{share:.0%}' for share in SHARES)} of the weights are resident: evenly spread, or "
        "those that keep copies and computing in step (`lowtide.planning.residents`). `worst` is over computing from a "
        "quarter to four times as fast as on the PCIe 4 card.",
        "",
        f"| | weights come | {' | '.join(CARDS)} | worst | room, MB |",
        "|:--|:--|" + ":-:|" * len(CARDS) + ":-:|--:|",
    ]
    for name, units in networks.items():
        for way in WAYS:
            steps = cells[name, way]
            columns = [steps[start : start + len(SHARES)] for start in range(0, len(steps), len(SHARES))]
            row = [" ".join(f"{one.ratio:.2f}" for one in column) for column in columns]
            row.append(" ".join(f"{worst(units, share, way):.2f}" for share in SHARES))
            lines.append(f"| {name} | {way.name} | {' | '.join(row)} | {max(one.room for one in steps) / 1e6:.0f} |")
    lines += ["", *room_table(networks)]
    return "\n".join([*lines, ""])


def worst(units: list[Block], share: float, way: Way) -> float:
    """The largest ratio over speeds of computing."""
    return max(step(units, "PCIe 4", share, way, speed).ratio for speed in SPEEDS)


def room_table(networks: dict[str, list[Block]]) -> list[str]:
    """How many bytes it takes to come within the goal, and why."""
    lines = [
        f"## Room that it takes to come within {GOAL:.2f}, MB",
        "",
        "A network whose parts differ computes for long with few weights in some stretches and shortly with many in "
        "others: the first blocks of FLUX and the deep levels of a U-Net copy for longer than they compute, the others "
        "compute for longer. Copies for the one stretch can only be made during the other as far as there is room for "
        "them. Residents in the stretches that copy for longer take less room. Where `-` stands, not even a room of 24 "
        "of the largest unit is enough.",
        "",
        f"| | residents | {' | '.join(CARDS)} |",
        "|:--|:--|" + "--:|" * len(CARDS),
    ]
    for name, units in networks.items():
        for words, choose in {"evenly": evenly, "in step": choose_in_step}.items():
            rooms = [" ".join(room_needed(units, card, share, choose) for share in SHARES) for card in CARDS]
            lines.append(f"| {name} | {words} | {' | '.join(rooms)} |")
    return lines


def room_needed(units: list[Block], card: str, share: float, choose: Choose) -> str:
    """The least bytes with which a step comes within the goal, in MB."""
    for halves in range(2, 49):
        one = step(units, card, share, Way("", choose, largest=halves / 2))
        if one.ratio <= GOAL:
            return f"{one.room / 1e6:.0f}"
    return "-"


if __name__ == "__main__":
    main()
