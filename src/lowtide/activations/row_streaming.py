"""Compute a convolutional network row by row, exactly: the public face of row streaming.

Row streaming changes where the numbers of a map rest, not what they are: every output is the whole network's up to the
rounding of floating-point sums. Unlike tiles it has no seams, no overlaps that are computed twice, and the statistics
of every norm are those of the whole picture.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lowtide.activations.frame_cache import FrameCache
from lowtide.activations.meta_run import DryRun
from lowtide.activations.pages import FilePages, MemoryPages, NoPages, Pages, pages_in_block
from lowtide.activations.passes import Schedule, plan
from lowtide.activations.recording import trace
from lowtide.activations.rules import NotByRowsError
from lowtide.activations.run import Progress, RowSink, Run
from lowtide.machine.host import host_memory
from lowtide.memory.rule import Tier
from lowtide.ops.meta_device import meant_device, meant_type, note_stored
from lowtide.sizes import format_decimal, parse_bytes

LEAST_WORK = 8 * 2**20
ROWS_AT_WORK = {4: 8, 5: 40}
"""The bytes of so many of the widest rows are at work together: of maps, and of clips, whose bands are thin else."""
LARGEST_PAGE = 2**20
SCHEDULES_KEPT = 8
"""Plans of the forms last used, about 0.3 MB each; a clip has up to four: first, middle, last and only frames."""
FREE_SHARE = 0.5
"""Of the memory that is free, rows take at most this share before they go elsewhere."""


@dataclass(frozen=True)
class RowSettings:
    """How rows rest and how many work; sizes in bytes.

    `rows` is where they rest: on the DEVICE, the HOST or the DISK; None takes the first of these with room. `budget`
    limits rows and work together in the memory that is computed in. `work` limits the bands worked on at once; None
    chooses. `folder` is where a file without a name is made for rows on disk; None: the system's temporary folder.
    """

    rows: Tier | None = None
    budget: int | None = None
    work: int | None = None
    folder: str | os.PathLike[str] | None = None

    @classmethod
    def of(
        cls,
        rows: Tier | str | None = None,
        budget: int | str | None = None,
        work: int | str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> RowSettings:
        """From what people write; raises `ValueError` for what is not possible."""
        if rows is not None and rows not in list(Tier):
            raise ValueError(
                f"rows={rows!r} is not possible: rows rest on 'device', 'host' or 'disk', or None chooses."
            )
        if folder is not None:
            _check_folder(folder)
        sizes = [None if size is None else parse_bytes(size) for size in (budget, work)]
        return cls(None if rows is None else Tier(rows), sizes[0], sizes[1], folder)


@dataclass(frozen=True)
class RowForecast:
    """What a run will take, known before it begins, in bytes: rows stored at once, the bands at work, and where."""

    rows: Tier
    stored: int
    work: int
    passes: int

    @property
    def peak(self) -> int:
        """Bytes in the memory that is computed in; not in it are the output, the copies of
        a pass's weights and what convolutions need themselves.
        """
        return self.work + (self.stored if self.rows is Tier.DEVICE else 0)


class RowStreaming:
    """Row streaming at work on one module: it stands in the place of the module's `forward`.

    `last` tells what the last run took, `watch` is called after every band with how far the run is.
    """

    def __init__(self, module: nn.Module, settings: RowSettings) -> None:
        self.module = module
        self.settings = settings
        self.last: RowForecast | None = None
        self.most_room = 0
        """Bytes of memory that the rows of any run so far take there, wherever they were."""
        self.watch: Callable[[Progress], None] | None = None
        self._schedules: dict[Any, Schedule] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output for maps `[B, C, H, W]` or clips `[B, C, F, H, W]`, one of the batch at a time."""
        _check_input(x)
        cache = _cache_in(args, kwargs)
        if len(x) > 1 and cache is not None:
            raise ValueError(f"Frames are kept for one clip, and this is a batch of {len(x)}: decode one at a time.")
        if x.shape[0] == 0:
            raise ValueError(f"There is no picture in a batch {list(x.shape)}.")
        output: torch.Tensor | None = None
        pictures = x.split(1)
        for place, one in enumerate(pictures[:1] if x.is_meta else pictures):  # the others take no more memory
            schedule = self.schedule(one, args, kwargs)
            if output is None:
                output = x.new_empty((len(x), *schedule.trace.output.shape[1:]), dtype=schedule.trace.output.dtype)
            self._run(one, schedule, functools.partial(_put, output[place : place + 1]), cache)
        assert output is not None
        return output

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the plans are made anew."""
        return {**self.__dict__, "_schedules": {}, "watch": None}

    def stream(self, x: torch.Tensor, write: RowSink, *args: Any, **kwargs: Any) -> None:
        """Compute one picture `[1, C, H, W]` and hand finished rows to `write` from top to bottom."""
        self._run(x, self.schedule(x, args, kwargs), write, _cache_in(args, kwargs))

    def forecast(self, shape: tuple[int, ...], dtype: torch.dtype | None = None, *args: Any) -> RowForecast:
        """What a run over one picture `[1, C, H, W]` or clip of this shape will take, without running it.

        `dtype` is that of the weights unless given, `args` are the module's other arguments. Raises `ValueError` for a
        budget that is too small.
        """
        weight = next(self.module.parameters(), torch.empty(0))
        example = torch.empty(1, dtype=dtype or weight.dtype, device=weight.device).expand(shape)
        return self._forecast(self.schedule(example, args, {}), example.device)

    def check(self, shape: tuple[int, ...], *args: Any) -> None:
        """Raise now what a run over such a picture would raise: `ValueError`, or `OSError` for a disk too small."""
        found = self.forecast(shape, None, *args)
        if found.rows is Tier.DISK:
            _check_disk(found.stored, self.settings.folder)

    def schedule(self, x: torch.Tensor, args: Any, kwargs: Any) -> Schedule:
        """The plan for inputs of this form; raises `NotByRowsError`, a `ValueError`, for what has none.

        Those of the forms last used are kept.
        """
        _check_input(x)
        if any(isinstance(one, torch.Tensor) for one in (*args, *kwargs.values())):
            raise ValueError(f"Row streaming of {type(self.module).__name__} takes one map and no other tensors.")
        told = tree_map_only(FrameCache, lambda cache: (cache.has_before, cache.is_last), (args, kwargs))
        key = (tuple(x.shape[1:]), x.dtype, repr(told), _form(self.module))
        schedule = self._schedules.pop(key, None)
        if schedule is None:
            try:
                schedule = plan(trace(self.module, (1, *x.shape[1:]), x.dtype, args, kwargs))
            except NotByRowsError as reason:
                raise NotByRowsError(
                    f"{type(self.module).__name__} cannot be computed row by row: {reason}. Compute it whole, or, an "
                    "autoencoder, in tiles with enable_vae_tiling(mode='blended')."
                ) from reason.__cause__
        self._schedules[key] = schedule  # the last used is the last one
        while len(self._schedules) > SCHEDULES_KEPT:
            del self._schedules[next(iter(self._schedules))]
        return schedule

    def _run(self, x: torch.Tensor, schedule: Schedule, write: RowSink, cache: FrameCache | None) -> None:
        if torch.is_grad_enabled() and (x.requires_grad or _trains(self.module)):
            raise ValueError("Row streaming keeps nothing for gradients: call it under torch.no_grad(), or disable it.")
        found = self._forecast(schedule, x.device)
        with torch.no_grad():
            pages = self._pages(found, schedule, x.device) if cache is None else self._pages_of_clip(x, schedule, cache)
            pages.count_anew()
            run = DryRun if x.is_meta else Run
            run(self.module, schedule, pages, self._work(schedule), cache)(x, write, self.watch)
        block = pages.page_bytes * pages_in_block(meant_type(x.device))
        self.most_room = max(self.most_room, -(-pages.peak_bytes // block) * block)
        rows = found.rows if cache is None else cache.rows
        if meant_device() is not None and rows is Tier.DISK:
            note_stored(pages.peak_bytes)
        self.last = RowForecast(rows, pages.peak_bytes, found.work, found.passes)

    def _pages_of_clip(self, x: torch.Tensor, schedule: Schedule, cache: FrameCache) -> Pages:
        """Pages for all batches of frames: where the largest has room, which has frames before it and keeps some."""
        if cache.pages is None:
            largest = schedule
            if not cache.is_last:
                middle = FrameCache()
                middle.has_before = True
                frames = x.shape[2] if cache.size is None else min(cache.size, x.shape[2])
                others = self.schedule(x[:, :, :frames], (middle,), {})
                largest = max(schedule, others, key=lambda one: one.forecast(self._work(one))[0])
            found = self._forecast(largest, x.device)
            cache.rows, cache.pages = found.rows, self._pages(found, largest, x.device)
        return cache.pages

    def _forecast(self, schedule: Schedule, device: torch.device) -> RowForecast:
        stored, bands = schedule.forecast(self._work(schedule), self._page_bytes(schedule))
        rows = self.settings.rows or self._place(stored, bands, device)
        if meant_type(device) == "cpu" and rows is Tier.HOST:
            rows = Tier.DEVICE  # the same memory
        forecast, budget = RowForecast(rows, stored, bands, len(schedule.passes)), self.settings.budget
        if budget is not None and forecast.peak > budget:
            kept = "" if rows is Tier.DISK else f", and what rests on the {rows} {format_decimal(stored)}"
            raise ValueError(
                f"budget={format_decimal(budget)} is too small for this picture: one row of it at work takes "
                f"{format_decimal(bands)}{kept}. Give more, or a narrower picture."
            )
        return forecast

    def _work(self, schedule: Schedule) -> int:
        widest = max((target.row_bytes for one in schedule.passes for target in one.targets), default=0)
        usual = max(LEAST_WORK, ROWS_AT_WORK[len(schedule.trace.source.shape)] * widest)
        chosen = usual if self.settings.work is None else self.settings.work
        return chosen if self.settings.budget is None else min(chosen, self.settings.budget)

    def _place(self, stored: int, work: int, device: torch.device) -> Tier:
        """The fastest place with room for the rows."""
        free = _free(device) * FREE_SHARE if self.settings.budget is None else self.settings.budget
        if stored + work <= free:
            return Tier.DEVICE
        if meant_type(device) != "cpu" and stored <= host_memory().available * FREE_SHARE:
            return Tier.HOST
        return Tier.DISK

    def _page_bytes(self, schedule: Schedule) -> int:
        """Small beside what is stored in all planes, so that little of the pages is empty."""
        stored, _ = schedule.forecast(self._work(schedule))
        return min(LARGEST_PAGE, max(4096, stored // max(128, 16 * schedule.planes)))

    def _pages(self, forecast: RowForecast, schedule: Schedule, device: torch.device) -> Pages:
        page = self._page_bytes(schedule)
        if device.type == "meta" and forecast.rows is not Tier.DEVICE:
            return NoPages(page)
        if forecast.rows is Tier.DISK:
            _check_disk(forecast.stored, self.settings.folder)
            return FilePages(page, self.settings.folder)
        return MemoryPages(page, device if forecast.rows is Tier.DEVICE else torch.device("cpu"))


def apply_row_streaming(
    module: nn.Module,
    *,
    rows: Tier | str | None = None,
    budget: int | str | None = None,
    work: int | str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> RowStreaming:
    """Have any convolutional network over maps `[B, C, H, W]` computed row by row: the same result, in less memory.

    Clips `[B, C, F, H, W]` too: all frames of a call at once, row by row.

    Works for encoders and decoders made of convolutions, group, layer and batch norms, activations, additions,
    nearest-neighbour enlargement and attention over pixels. `rows` is where finished rows rest ("device", "host" or
    "disk"; None takes the first with room, at most `budget` bytes with the bands at work), `work` the bytes of the
    bands at work (sizes as numbers or text such as "500MB"), `folder` where the file without a name is made. A module
    is traced at its first call with a new shape, without computing anything; it keeps nothing for gradients.
    `remove_row_streaming` undoes it. Raises `ValueError` for settings that are not possible; a call raises
    `NotByRowsError`, a `ValueError`, naming what the network does that needs the whole map, and `OSError` if the disk
    is full.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"Row streaming is for a torch.nn.Module, not for a {type(module).__name__}.")
    settings = RowSettings.of(rows, budget, work, folder)
    remove_row_streaming(module)
    if "forward" in module.__dict__:
        raise ValueError(f"The forward of this {type(module).__name__} was replaced by somebody else: undo that first.")
    streaming = RowStreaming(module, settings)
    module.__dict__["forward"] = streaming
    return streaming


def remove_row_streaming(module: nn.Module) -> None:
    """Undo `apply_row_streaming`; does nothing where it was not applied."""
    if row_streaming_of(module) is not None:
        del module.__dict__["forward"]


def row_streaming_of(module: nn.Module) -> RowStreaming | None:
    """The row streaming at work on a module, if there is one."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, RowStreaming) else None


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on besides the input: the parts of a module, and the forms of its weights."""
    parts = tuple((name, type(part), part.training) for name, part in module.named_modules())
    weights = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tensor.shape, tensor.dtype) for name, tensor in weights)


def _trains(module: nn.Module) -> bool:
    return module.training and any(weight.requires_grad for weight in module.parameters())


def _put(output: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    output.narrow(-2, first, rows.shape[-2]).copy_(rows)


def _cache_in(args: Any, kwargs: Any) -> FrameCache | None:
    return next((one for one in (*args, *kwargs.values()) if isinstance(one, FrameCache)), None)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available


def _check_input(x: object) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim not in (4, 5):
        given = list(x.shape) if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"Row streaming needs maps [B, C, H, W] or clips [B, C, F, H, W], and this is {given}.")


def _check_folder(folder: object) -> None:
    if not isinstance(folder, (str, os.PathLike)) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"folder={folder!r} is not possible: it is no folder that can be written in.")


def _check_disk(nbytes: int, folder: str | os.PathLike[str] | None) -> None:
    """Say that the disk is too small before an hour of work, not after it."""
    place = folder or tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(
            f"{format_decimal(nbytes)} of rows do not fit in {place} (free: {format_decimal(free)}). Choose another "
            "folder, a smaller picture, or half precision."
        )
