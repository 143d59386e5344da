"""Files on their way: named by the process that writes them, whole or not there at all, and never left for good."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

KEPT_SECONDS = 7 * 24 * 3600
"""How long files stay that no process of this machine is known to write."""
_UNFINISHED = re.compile(r"\..+\.([0-9a-f]{8})-(\d{1,9})-\d+\.tmp")
_numbers = itertools.count()


def writer() -> str:
    """This process, for the name of a file: a word for the machine, since folders are shared, and the process id."""
    return f"{_machine()}-{os.getpid()}"


def unfinished_path(target: Path) -> Path:
    """A name beside `target` that nobody else has, for what is renamed to it when it is whole.

    What processes that are gone left there under such names is removed.
    """
    remove_stale(target.parent, _UNFINISHED)
    return target.with_name(f".{target.name[:200]}.{writer()}-{next(_numbers)}.tmp")


@contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """Give the name of a file to write: it becomes `path` if the block ends well, and is removed if not.

    Until then the old file, if any, stays under the name, also when the block is interrupted.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    unfinished = unfinished_path(target)
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_stale(folder: Path, names: re.Pattern[str]) -> None:
    """Remove this user's files with such names, if their process is gone, or, if that cannot be known, after a week.

    `names` has two groups, which give the two parts of `writer`; a file that nobody writes any more has neither.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:  # whoever writes there says so
        return
    for entry in entries:
        match = names.fullmatch(entry.name)
        if match is not None:
            with suppress(OSError):  # another process may be tidying too
                if _is_stale(entry.stat(follow_symlinks=False), match[1], match[2]):
                    Path(entry.path).unlink()


def _is_stale(about: os.stat_result, machine: str | None, process: str | None) -> bool:
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
        return False
    if machine == _machine() and process is not None:
        return not psutil.pid_exists(int(process))
    return time.time() - about.st_mtime > KEPT_SECONDS


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
