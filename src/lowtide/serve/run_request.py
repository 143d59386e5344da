"""What the process that computes is asked to make, and what of that is not made yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.planning.plan import Budgets
from lowtide.serve.job import TEXTS
from lowtide.serve.made_files import MadeFiles


@dataclass(frozen=True)
class Along:
    """Pictures of another job, which waits: one of its `texts` for each of the `seeds`, in its `folder`."""

    texts: dict[str, str]
    seeds: list[int]
    folder: Path

    def missing(self) -> list[Picture]:
        """Those that are not made yet, in order."""
        made = MadeFiles(self.folder)
        return [Picture(made, place, seed, self.texts) for place, seed in enumerate(self.seeds) if place not in made]


@dataclass(frozen=True)
class Picture:
    """A picture or clip that is to be made: where it is written, and what it is made from."""

    made: MadeFiles
    place: int
    seed: int
    texts: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A picture or clip for each of the `seeds` by a call of `model`, with files in `folder`.

    `pictures` are files of arguments that are pictures. `share` is how much it may take of the budget, or of `within`
    where that is less; `exactness` is what a plan has told of its results. A call makes up to `together` pictures where
    that is planned to be faster: the same up to rounding. Where these are more than are left, some of those `along` are
    made with them.
    """

    model: str
    call: dict[str, Any]
    seeds: list[int]
    folder: Path
    pictures: dict[str, list[str]]
    share: float = 1.0
    within: Budgets | None = None
    exactness: str | None = None
    together: int = 1
    along: Sequence[Along] = ()

    @property
    def made(self) -> MadeFiles:
        """Its results."""
        return MadeFiles(self.folder)

    def missing(self) -> tuple[list[Picture], list[Picture]]:
        """The pictures that are not made yet: its own, and those along."""
        texts = {name: value for name, value in self.call.items() if name in TEXTS}
        own = Along(texts, self.seeds, self.folder).missing()
        return own, [picture for each in self.along for picture in each.missing()]
