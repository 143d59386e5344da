"""Files on their way: named by the process that writes them, whole or not there at all, and never left for good."""

from __future__ import annotations

import errno
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
    """This process, for the name of a file: a word for where its id is known, since folders are shared, and the id."""
    return f"{_machine()}-{os.getpid()}"


def unfinished_path(target: Path) -> Path:
    """A name beside `target` that nobody else has, for what is renamed to it when it is whole.

    What processes that are gone left there under such names is removed. Raises `OSError` as `check_replaceable` does.
    """
    check_replaceable(target)
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
        with naming(path):
            yield unfinished
            take_place(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise `OSError`, naming the file, for one that cannot be replaced by another: a pipe, a device, one not ours."""
    try:
        about = os.stat(path)
    except OSError:  # there is none, or whoever writes it says why not
        return
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, "It is a folder; give the name of a file", str(path))
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "It is a pipe, a socket or a device; give the name of a file", str(path))
    if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, "It is there already and may not be written to", str(path))


def take_place(unfinished: Path, target: Path) -> None:
    """Rename a whole file to `target`; it takes over mode and owner of the file that it replaces."""
    try:
        about = os.stat(target)
    except FileNotFoundError:
        about = None
    if about is not None:
        with suppress(OSError):  # only the superuser gives files away
            os.chown(unfinished, about.st_uid, about.st_gid)
        unfinished.chmod(stat.S_IMODE(about.st_mode))
    unfinished.replace(target)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an `OSError` of the block name the file, where it names none, as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if type(error) is OSError and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


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
    running = None if machine is None or process is None else is_running(machine, int(process))
    return time.time() - about.st_mtime > KEPT_SECONDS if running is None else not running


def is_running(machine: str, process: int) -> bool | None:
    """Whether the process of a `writer` is running; None for one of another machine, of which that is not known."""
    return psutil.pid_exists(process) if machine == _machine() else None


def _machine() -> str:
    """This machine as long as it runs, and where process ids are counted by container, this container.

    After that another process may have the id.
    """
    words = [platform.node()]
    with suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        words.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("".join(words).encode()).hexdigest()[:8]
