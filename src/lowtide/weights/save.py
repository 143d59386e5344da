"""Write checkpoints so that a save that is cut short never leaves a checkpoint that is half old and half new.

`save_tensors` writes the published layout; `atomic_folder` moves a finished folder into place. While the new files are
being written the target is untouched. They are then moved in three steps, each on disk before the next begins:
1. every old file that a new one replaces or supersedes is moved aside, entry points (`ENTRY_POINTS`) first;
2. the new files are moved in; 3. the new entry points follow, the outermost last.
So at any moment the target holds files of the old save or of the new one, never of both, and an incomplete save has no
entry point. An exception undoes the steps. Before them the moves are written down in the hidden folder
`.NAME.saving-*`, where new files wait under `new` and old ones under `old`: if the process is killed during the steps
(they take milliseconds), whoever next loads or saves there completes them, see `lowtide.killed_saves`. Files that are
not part of the new save stay as they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowtide.killed_saves import MOVES, Moves, complete_saves, work_name
from lowtide.media.unfinished import writer
from lowtide.sizes import parse_bytes
from lowtide.weights.index import DTYPES, parse_weights_name

ENTRY_POINTS = re.compile(r"model_index\.json|config\.json|.*\.safetensors(\..+)?\.index(\..+)?\.json")
"""Names of the files without which a folder, or the weights in it, are not loaded at all."""


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    base_name: str,
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> tuple[Path, ...]:
    """Write `tensors` to `folder` as `base_name[.variant].safetensors`, or as shards with an index; return the files.

    `max_shard_size` is in bytes or text such as "5GB" (None: one file); a larger tensor has a shard for itself. Tied
    tensors are stored once, under the first name. Each file appears under its name when it is complete, so even a file
    that a live tensor maps can be replaced; to replace a whole checkpoint, write inside `atomic_folder`. Peak
    memory: copies of those tensors of one shard that are not contiguous, not on the CPU, or views of one storage.
    Raises `ValueError` for tensors that safetensors cannot hold.
    """
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_\-]+", variant):
        raise ValueError(f"variant {variant!r} must be of letters, digits, '_' and '-', such as 'fp16'.")
    _check_savable(tensors)
    unique = _without_ties(tensors)
    limit = None if max_shard_size is None else parse_bytes(max_shard_size)
    shards = _split(unique, limit)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{base_name}.{variant}" if variant else base_name
    if len(shards) == 1:
        return (_write_shard(folder / f"{stem}.safetensors", shards[0]),)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [_write_shard(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    index = folder / (
        f"{base_name}.safetensors.index.{variant}.json" if variant else f"{base_name}.safetensors.index.json"
    )
    _write_shard_index(index, names, shards)
    return (*files, index)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write in; when the block ends well, its files become those of `target`.

    A new `target` appears by one rename. In an existing one the steps are those at the top of this module, and
    weights of the same base name and variant that the new ones supersede (say, shards by one file) are removed. If the
    block or a step raises, `target` is as it was. Raises `NotADirectoryError` if `target` is a file.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a checkpoint is saved to a folder.")
    # Inside an existing target, and not beside it: the target may be a mount, and renames do not cross mounts.
    home = target if target.is_dir() else target.parent
    complete_saves(home)
    work = home / work_name(target, writer())
    new, old = work / "new", work / "old"
    try:
        new.mkdir(parents=True)
        yield new
        _sync_tree(new)
        if target.is_dir():
            _replace_files(new, target, old)
        else:
            new.rename(target)
            _sync([target.parent])
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if not any(path.is_symlink() or path.is_file() for path in old.rglob("*")):  # else undoing has failed
            shutil.rmtree(work, ignore_errors=True)


def _without_ties(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[tuple[object, ...]] = set()
    unique: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            unique[name] = tensor
        seen.add(key)
    return unique


def _check_savable(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(
                f"Tensor {name!r} is on meta: it has a shape and no values. Load the model before saving it."
            )
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            raise ValueError(f"Tensor {name!r} is {tensor.dtype}, {tensor.layout}; safetensors has no such kind.")


def _split(tensors: Mapping[str, torch.Tensor], limit: int | None) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _write_shard(file: Path, shard: Mapping[str, torch.Tensor]) -> Path:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    partial = file.with_name(f".{file.name}.partial")
    partial.touch()
    mode = partial.stat().st_mode  # the mode of new files here; the library makes its files unreadable to others
    save_file(_apart(plain), partial, metadata={"format": "pt"})
    partial.chmod(mode & 0o777)
    os.replace(partial, file)
    return file


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with views of one storage copied: the library refuses tensors that share memory."""
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    uses = Counter(pointers.values())
    return {name: tensor.clone() if uses[pointers[name]] > 1 else tensor for name, tensor in tensors.items()}


def _write_shard_index(file: Path, names: list[str], shards: list[dict[str, torch.Tensor]]) -> None:
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _replace_files(new: Path, target: Path, old: Path) -> None:
    """Move the files of `new` into `target` and those they replace into `old`; undo it all if a step raises."""
    incoming = sorted((path.relative_to(new) for path in _files(new)), key=_entry_rank)
    outgoing = sorted(_outgoing(target, incoming), key=_entry_rank, reverse=True)
    plain = [path for path in incoming if not _is_entry_point(path)]
    Moves(tuple(outgoing), tuple(incoming)).write(new.parent)
    with ExitStack() as undo:
        undo.callback((new.parent / MOVES).unlink)
        _move_all(outgoing, target, old, undo)
        _move_all(plain, new, target, undo)
        _move_all(incoming[len(plain) :], new, target, undo)
        undo.pop_all()


def _move_all(paths: list[Path], source: Path, destination: Path, undo: ExitStack) -> None:
    for path in paths:
        _make_folder((destination / path).parent, undo)
        undo.callback(_move_back, destination / path, source / path)
        (source / path).rename(destination / path)
    _sync({root / parent for root in (source, destination) for path in paths for parent in path.parents})


def _make_folder(folder: Path, undo: ExitStack) -> None:
    if not folder.exists():
        _make_folder(folder.parent, undo)
        undo.callback(folder.rmdir)
        folder.mkdir()


def _move_back(moved: Path, origin: Path) -> None:
    if os.path.lexists(moved) and not os.path.lexists(origin):  # an interrupt may come before the move
        moved.rename(origin)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _outgoing(target: Path, incoming: Iterable[Path]) -> list[Path]:
    """Files of `target` that an incoming file replaces, or supersedes as weights of one base name and variant."""
    arriving = set(incoming)
    weights = {key for path in arriving if (key := _weights_key(path))}
    folders = {path.parent for path in arriving}
    present = [
        path.relative_to(target) for folder in folders for path in (target / folder).glob("*") if not path.is_dir()
    ]
    return [path for path in present if path in arriving or _weights_key(path) in weights]


def _weights_key(path: Path) -> tuple[Path, str, str | None] | None:
    parsed = parse_weights_name(path.name)
    return (path.parent, parsed.base, parsed.variant) if parsed else None


def _is_entry_point(path: Path) -> bool:
    return ENTRY_POINTS.fullmatch(path.name) is not None


def _entry_rank(path: Path) -> tuple[bool, int, str]:
    """The order in which files are moved in: plain files, then entry points, the outermost last."""
    is_entry = _is_entry_point(path)
    return is_entry, -len(path.parts) if is_entry else 0, str(path)


def _sync_tree(folder: Path) -> None:
    _sync([folder, *folder.rglob("*")])


def _sync(paths: Iterable[Path]) -> None:
    """Make writes and renames survive a power cut. Windows cannot do that with a file that is open for reading."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
