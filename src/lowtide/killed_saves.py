"""Saves whose process was killed: whoever next loads or saves completes them, or clears away what they left.

A save works in a hidden folder `.NAME.saving-*` that is named by its process. Once all new files are there it writes
down its moves, and only then moves anything. So a save that left such a list is completed by it, and of one that left
none the checkpoint is untouched.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lowtide.configs import CheckpointError, read_json
from lowtide.media.unfinished import KEPT_SECONDS, is_running, writer

_WORK = re.compile(r"\..+\.saving-([0-9a-f]{8})-(\d{1,9})-\d+")
MOVES = "moves.json"
_MOST_BYTES = 16 * 2**20
_MOVING_SECONDS = 60
"""Moves take milliseconds: a list of them as old as this, of a machine whose processes we cannot see, is of no one."""
_WAIT_SECONDS = 5
"""How long a load or a save waits for the moves of another process."""
_numbers = itertools.count()


def work_name(target: Path, writer: str) -> str:
    """The name of a new hidden folder in which a save of `target` by the process `writer` works."""
    return f".{target.name}.saving-{writer}-{next(_numbers)}"


@dataclass(frozen=True)
class Moves:
    """Files of a save by their paths in the checkpoint: in this order old ones go out, and then new ones come in."""

    outgoing: tuple[Path, ...]
    incoming: tuple[Path, ...]

    def write(self, work: Path) -> None:
        """Note them on the disk, at once and whole: from here on the save will be completed."""
        listed = {name: [path.as_posix() for path in paths] for name, paths in vars(self).items()}
        partial = work / f"{MOVES}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(listed, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, work / MOVES)

    @classmethod
    def read(cls, work: Path) -> Moves:
        """Those that a save noted; raises `CheckpointError` for anything else."""
        listed = read_json(work / MOVES, _MOST_BYTES)
        return cls(_paths(work, listed.get("outgoing")), _paths(work, listed.get("incoming")))


def complete_saves(target: Path) -> None:
    """Complete the killed saves of a checkpoint's folder, and remove what others left in it; no live one is touched.

    Raises `OSError` where one cannot be completed, since the folder cannot be written to.
    """
    for work in _left_in(target):
        if not (work / MOVES).is_file():
            shutil.rmtree(work, ignore_errors=True)
            continue
        try:
            _complete(target, work)
        except OSError as error:
            raise OSError(
                error.errno,
                f"A save of {target} was killed midway, and it cannot be completed now ({error.strerror}). Load it "
                "once where the folder can be written to, or save it anew.",
            ) from error
    _wait_for_others(target)


def _wait_for_others(target: Path) -> None:
    """Wait while living processes of this machine move files in a checkpoint: it is half old and half new meanwhile."""
    began = time.monotonic()
    while time.monotonic() - began < _WAIT_SECONDS and any(_is_moving(work) for work in _works_in(target)):
        time.sleep(0.01)


def _is_moving(work: Path) -> bool:
    match = _WORK.fullmatch(work.name)
    return match is not None and (work / MOVES).is_file() and is_running(match[1], int(match[2])) is True


def _left_in(target: Path) -> list[Path]:
    """The hidden folders of saves whose processes are gone."""
    return [work for work in _works_in(target) if _is_over(work)]


def _works_in(target: Path) -> list[Path]:
    """The hidden folders of saves."""
    try:
        entries = [entry for entry in os.scandir(target) if entry.is_dir(follow_symlinks=False)]
    except OSError:  # whoever reads there says so
        return []
    return [Path(entry.path) for entry in entries if _WORK.fullmatch(entry.name)]


def _is_over(work: Path) -> bool:
    match = _WORK.fullmatch(work.name)
    running = None if match is None else is_running(match[1], int(match[2]))
    if running is not None:
        return not running
    moves = work / MOVES
    with suppress(OSError):
        began = moves.stat().st_mtime if moves.is_file() else work.stat().st_mtime
        return time.time() - began > (_MOVING_SECONDS if moves.is_file() else KEPT_SECONDS)
    return False


def _complete(target: Path, work: Path) -> None:
    try:
        moves = Moves.read(work)
    except FileNotFoundError:  # another process, which came first, completes it or has done so
        return
    if any(os.path.lexists(work / "new" / path) for path in moves.incoming):
        work = _completed(target, work, moves)
    shutil.rmtree(work, ignore_errors=True)


def _completed(target: Path, killed: Path, moves: Moves) -> Path:
    """Make the moves, in the folder of a killed save under the name of this process, so that no other makes them too.

    Returns that folder. If a move fails, it has its old name again.
    """
    work = killed.with_name(f"{killed.name.rpartition('.saving-')[0]}.saving-{writer()}-{next(_numbers)}")
    try:
        killed.rename(work)
        _make(target, work, moves)
    except BaseException as error:
        if os.path.lexists(work):
            with suppress(OSError):
                work.rename(killed)
            raise
        if not isinstance(error, FileNotFoundError):  # else another process came first
            raise
    return work


def _make(target: Path, work: Path, moves: Moves) -> None:
    new, old = work / "new", work / "old"
    waiting = [path for path in moves.incoming if os.path.lexists(new / path)]
    arrived = set(moves.incoming).difference(waiting)
    for path in moves.outgoing if waiting else ():
        if path not in arrived and os.path.lexists(target / path):
            _move(target, old, path)
    for path in waiting:
        _move(new, target, path)


def _move(source: Path, destination: Path, path: Path) -> None:
    (destination / path).parent.mkdir(parents=True, exist_ok=True)
    for root in (source, destination):  # a folder from elsewhere may hold links that lead out of it
        if (root / path).parent.resolve() != (root.resolve() / path).parent:
            raise CheckpointError(f"{root / path} is behind a link, so a save that was killed is not completed there.")
    (source / path).rename(destination / path)


def _paths(work: Path, listed: object) -> tuple[Path, ...]:
    names: Iterable[object] = listed if isinstance(listed, list) else [None]
    paths: list[Path] = []
    for name in names:
        parts = Path(name).parts if isinstance(name, str) else ()
        if not parts or Path(*parts).is_absolute() or ".." in parts or "\0" in str(name):
            raise CheckpointError(f"{work / MOVES} is no list of a save's moves: it holds {name!r:.80}.")
        paths.append(Path(*parts))
    return tuple(paths)
