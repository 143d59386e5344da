"""Row streaming: any convolutional network computed row by row, in less memory and with the same result.

The result is that of the whole network up to the rounding of floating-point sums. Unlike tiles, rows have no seams and
no overlaps that are computed twice, and every norm takes its statistics of the whole picture.
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
from lowtide.activations.recording import check_no_autocast, trace
from lowtide.activations.rules import NotByRowsError
from lowtide.activations.run import Progress, RowSink, Run, watch_here
from lowtide.machine.host import host_memory
from lowtide.memory.rule import Tier
from lowtide.ops.meta_device import meant_device, meant_type, note_stored
from lowtide.sizes import format_decimal, parse_bytes

LEAST_WORK = 8 * 2**20
ROWS_AT_WORK = {4: 8, 5: 40}
"""Bands at work take the bytes of so many of the widest rows: for maps (4 dimensions) and for clips (5), whose bands
would be thin with as few as for maps."""
LARGEST_PAGE = 2**20
SCHEDULES_KEPT = 8
"""Plans of the forms last used, about 0.3 MB each; a clip has up to four: first, middle, last and only frames."""
FREE_SHARE = 0.5
"""Rows rest in a memory if they take at most this share of what is free in it."""


@dataclass(frozen=True)
class RowSettings:
    """Where rows rest, and how much memory row streaming may take; sizes in bytes.

    `rows` is the tier where rows rest: DEVICE, HOST or DISK; None takes the first of these with room. `budget` limits
    the memory of the device: rows that rest on it and bands at work together. `work` limits the bands at work; None
    goes by the width of the rows. `folder` is the folder of the nameless file for rows on disk; None is the system's
    temporary folder.
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
        """Settings as users write them; raises `ValueError` for settings that are not possible."""
        if rows is not None and rows not in list(Tier):
            raise ValueError(
                f"rows={rows!r} is not possible: give 'device', 'host' or 'disk', or None for the first with room."
            )
        if folder is not None:
            _check_folder(folder)
        sizes = [None if size is None else parse_bytes(size) for size in (budget, work)]
        return cls(None if rows is None else Tier(rows), sizes[0], sizes[1], folder)


@dataclass(frozen=True)
class RowForecast:
    """What a run will take, before it begins: where rows rest, bytes of rows stored and of bands at work, passes."""

    rows: Tier
    stored: int
    work: int
    passes: int

    @property
    def peak(self) -> int:
        """Bytes in the memory of the device, without the output, the copies of a pass's weights and the workspace of
        convolutions.
        """
        return self.work + (self.stored if self.rows is Tier.DEVICE else 0)


class RowStreaming:
    """The row streaming of one module, in the place of the module's `forward`.

    `last` is what the last run took. `watch` is called after every band with the `Progress` of the run.
    """

    def __init__(self, module: nn.Module, settings: RowSettings) -> None:
        self.module = module
        self.settings = settings
        self.last: RowForecast | None = None
        self.most_room = 0
        """The most bytes that the rows of any run so far took, wherever they rested."""
        self.watch: Callable[[Progress], None] | None = None
        self._schedules: dict[Any, Schedule] = {}

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output for maps `[B, C, H, W]` or clips `[B, C, F, H, W]`, one of the batch at a time."""
        _check_input(x)
        cache = _cache_in(args, kwargs)
        if len(x) > 1 and cache is not None:
            raise ValueError(f"A cache is for one clip, and this is a batch of {len(x)}: decode one at a time.")
        if x.shape[0] == 0:
            raise ValueError(f"A batch {list(x.shape)} has no picture: give at least one.")
        output: torch.Tensor | None = None
        pictures = x.split(1)
        for place, picture in enumerate(pictures[:1] if x.is_meta else pictures):  # the others take no more memory
            schedule = self.schedule(picture, args, kwargs)
            if output is None:
                output = x.new_empty((len(x), *schedule.trace.output.shape[1:]), dtype=schedule.trace.output.dtype)
            self._run(picture, schedule, functools.partial(_put, output[place : place + 1]), cache)
        assert output is not None
        return output

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which make their own plans."""
        return {**self.__dict__, "_schedules": {}, "watch": None}

    def stream(self, x: torch.Tensor, write: RowSink, *args: Any, **kwargs: Any) -> None:
        """Compute one picture `[1, C, H, W]` and hand finished rows to `write` from top to bottom."""
        self._run(x, self.schedule(x, args, kwargs), write, _cache_in(args, kwargs))

    def forecast(self, shape: tuple[int, ...], dtype: torch.dtype | None = None, *args: Any) -> RowForecast:
        """What a run over one picture `[1, C, H, W]` or clip of this shape will take, without running it.

        `dtype` is that of the weights unless given; `args` are the module's other arguments. Raises `ValueError` for a
        budget that is too small.
        """
        weight = next(self.module.parameters(), torch.empty(0))
        example = torch.empty(1, dtype=dtype or weight.dtype, device=weight.device).expand(shape)
        return self._forecast(self.schedule(example, args, {}), example.device)

    def check(self, shape: tuple[int, ...], *args: Any) -> None:
        """Raise what a run over such a picture would raise: `ValueError`, or `OSError` for a disk that is too small."""
        forecast = self.forecast(shape, None, *args)
        if forecast.rows is Tier.DISK:
            _check_disk(forecast.stored, self.settings.folder)

    def schedule(self, x: torch.Tensor, args: Any, kwargs: Any) -> Schedule:
        """The plan for inputs of this form; raises `NotByRowsError`, a `ValueError`, for what has none.

        Those of the forms last used are kept.
        """
        _check_input(x)
        check_no_autocast(self.module, x.device)
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
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
            self._schedules.pop(next(iter(self._schedules)), None)  # another thread may have done so
        return schedule

    def _run(self, x: torch.Tensor, schedule: Schedule, write: RowSink, cache: FrameCache | None) -> None:
        if torch.is_grad_enabled() and (x.requires_grad or _trains(self.module)):
            raise ValueError("Row streaming keeps nothing for gradients: call it under torch.no_grad(), or disable it.")
        forecast = self._forecast(schedule, x.device)
        with torch.no_grad():
            if cache is None:
                pages = self._pages(forecast, schedule, x.device)
            else:
                pages = self._pages_of_clip(x, schedule, cache)
            pages.count_anew()
            run = DryRun if x.is_meta else Run
            run(self.module, schedule, pages, self._work(schedule), cache)(x, write, self.watch or watch_here())
        block = pages.page_bytes * pages_in_block(meant_type(x.device))
        self.most_room = max(self.most_room, -(-pages.peak_bytes // block) * block)
        rows = forecast.rows if cache is None else cache.rows
        if meant_device() is not None and rows is Tier.DISK:
            note_stored(pages.peak_bytes)
        self.last = RowForecast(rows, pages.peak_bytes, forecast.work, forecast.passes)

    def _pages_of_clip(self, x: torch.Tensor, schedule: Schedule, cache: FrameCache) -> Pages:
        """Pages for all batches of a clip, with room for the largest: one with frames before and after it."""
        if cache.pages is None:
            largest = schedule
            if not cache.is_last:
                middle = FrameCache()
                middle.has_before = True
                frames = x.shape[2] if cache.size is None else min(cache.size, x.shape[2])
                later = self.schedule(x[:, :, :frames], (middle,), {})
                largest = max(schedule, later, key=lambda each: each.forecast(self._work(each))[0])
            forecast = self._forecast(largest, x.device)
            cache.rows, cache.pages = forecast.rows, self._pages(forecast, largest, x.device)
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
        widest = max((target.row_bytes for pass_ in schedule.passes for target in pass_.targets), default=0)
        usual = max(LEAST_WORK, ROWS_AT_WORK[len(schedule.trace.source.shape)] * widest)
        chosen = usual if self.settings.work is None else self.settings.work
        return chosen if self.settings.budget is None else min(chosen, self.settings.budget)

    def _place(self, stored: int, work: int, device: torch.device) -> Tier:
        """The fastest tier with room for the rows."""
        free = _free(device) * FREE_SHARE if self.settings.budget is None else self.settings.budget
        if stored + work <= free:
            return Tier.DEVICE
        if meant_type(device) != "cpu" and stored <= host_memory().available * FREE_SHARE:
            return Tier.HOST
        return Tier.DISK

    def _page_bytes(self, schedule: Schedule) -> int:
        """Bytes of a page: few beside all stored rows, so that pages that are not full waste little."""
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
    """Compute a convolutional network row by row from now on: the same result, in less memory.

    The network takes maps `[B, C, H, W]`, or clips `[B, C, F, H, W]` with all frames of a call at once. It may be made
    of convolutions, group, layer and batch norms, activations, additions, nearest-neighbour enlargement and attention
    over pixels.

    `rows` is where finished rows rest: "device", "host" or "disk"; None takes the first with room. `budget` limits the
    bytes of rows on the device and of bands at work together, `work` those of bands at work; both are numbers or text
    such as "500MB". `folder` is where the nameless file for rows on disk is made. At its first call with a new shape
    the module is traced, without any computing. Nothing is kept for gradients. `remove_row_streaming` undoes it.

    Raises `ValueError` for settings that are not possible. A call raises `NotByRowsError`, a `ValueError`, if the
    network does something that needs the whole map, and names it; it raises `OSError` if the disk is full.
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
    """The row streaming that was applied to a module, if any."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, RowStreaming) else None


def _form(module: nn.Module) -> tuple[Any, ...]:
    """What a plan depends on besides the input: the parts of a module, and the shapes and dtypes of its weights."""
    parts = tuple((name, type(part), part.training) for name, part in module.named_modules())
    weights = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tensor.shape, tensor.dtype) for name, tensor in weights)


def _trains(module: nn.Module) -> bool:
    return module.training and any(weight.requires_grad for weight in module.parameters())


def _put(output: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    output.narrow(-2, first, rows.shape[-2]).copy_(rows)


def _cache_in(args: Any, kwargs: Any) -> FrameCache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, FrameCache)), None)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available


def _check_input(x: object) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim not in (4, 5):
        given = list(x.shape) if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"Row streaming needs maps [B, C, H, W] or clips [B, C, F, H, W], and this is {given}.")


def _check_folder(folder: object) -> None:
    if not isinstance(folder, (str, os.PathLike)) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"folder={folder!r} is not possible: give an existing folder that can be written to, or None.")


def _check_disk(nbytes: int, folder: str | os.PathLike[str] | None) -> None:
    """Raise `OSError` for a disk that is too small before an hour of work, not after it."""
    place = folder or tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(
            f"{format_decimal(nbytes)} of rows do not fit in {place} (free: {format_decimal(free)}). Choose another "
            "folder, a smaller picture, or half precision."
        )
