"""Row streaming: any convolutional network computed row by row, in less memory and with the same result.

The result is that of the whole network up to the rounding of floating-point sums. Unlike tiles, rows have no seams and
no overlaps that are computed twice, and every norm takes its statistics of the whole picture.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowtide.activations.frame_cache import FrameCache
from lowtide.activations.kept_frames import KeptOfOne, given_tensors, handed_back, kept_rows, of_one, said, simulated
from lowtide.activations.meta_run import DryRun
from lowtide.activations.pages import FilePages, MemoryPages, NoPages, Pages, pages_in_block
from lowtide.activations.passes import Schedule, plan
from lowtide.activations.recording import check_no_autocast, trace
from lowtide.activations.row_settings import RowForecast, RowSettings, check_disk
from lowtide.activations.run import Beside, Progress, RowSink, Run, watch_here
from lowtide.activations.traced_call import NotByRowsError
from lowtide.machine.accelerators import accelerator
from lowtide.machine.host import host_memory
from lowtide.memory.rule import Tier
from lowtide.ops.meta_device import meant_device, meant_type, note_stored
from lowtide.ops.modes import without_gradients
from lowtide.sizes import format_decimal

LEAST_WORK = 8 * 2**20
ROWS_AT_WORK = {4: 8, 5: 40}
"""Bands at work take the bytes of so many of the widest rows: for maps (4 dimensions) and for clips (5), whose bands
would be thin with as few as for maps."""
LARGEST_PAGE = 2**20
CALLS_AHEAD = 2
"""Calls after the first until a network that keeps frames goes on as before."""
SCHEDULES_KEPT = 8
"""Plans of the forms last used, about 0.3 MB each; a clip has up to four: first, middle, last and only frames."""
FREE_SHARE = 0.5
"""Rows rest in a memory if they take at most this share of what is free in it."""


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

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's output for maps `[B, C, H, W]` or clips `[B, C, F, H, W]`, one of the batch at a time.

        A module that keeps frames for its next call in lists or dictionaries finds `KeptRows` there in their place.
        """
        _check_input(x)
        cache = _cache_in(args, kwargs)
        if len(x) > 1 and cache is not None:
            raise ValueError(f"A cache is for one clip, and this is a batch of {len(x)}: decode one at a time.")
        if x.shape[0] == 0:
            raise ValueError(f"A batch {list(x.shape)} has no picture: give at least one.")
        output: torch.Tensor | None = None
        kept: list[KeptOfOne] = []
        pictures = x.split(self._together(x, kwargs))
        for place, picture in enumerate(pictures):
            beside = of_one((args, kwargs), place, len(pictures))
            schedule = self.schedule(picture, *beside)
            if output is None:
                output = x.new_empty((len(x), *schedule.trace.output.shape[1:]), dtype=schedule.trace.output.dtype)
            part = output.split(len(picture))[place]
            kept.append(self._run(picture, schedule, functools.partial(_put, part), beside))
            if x.is_meta and schedule.trace.after is None:
                break  # the others take no more memory
        assert output is not None
        if len(kept) > 1 and schedule.trace.kept:
            self._note_room([clip.pages for clip in kept], kept[0].tier, x.device)
        return handed_back(output, (args, kwargs), schedule.trace, kept)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which make their own plans."""
        return {**self.__dict__, "_schedules": {}, "watch": None}

    def stream(self, x: torch.Tensor, write: RowSink, *args: Any, **kwargs: Any) -> None:
        """Compute one picture `[1, C, H, W]` and hand finished rows to `write` from top to bottom."""
        self._run(x, self.schedule(x, args, kwargs), write, (args, kwargs))

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
            check_disk(forecast.stored, self.settings.folder)

    def schedule(self, x: torch.Tensor, args: Any, kwargs: Any) -> Schedule:
        """The plan for inputs of this form; raises `NotByRowsError`, a `ValueError`, for what has none.

        Those of the forms last used are kept.
        """
        _check_input(x)
        check_no_autocast(self.module, x.device)
        if any(tensor.ndim > 2 for tensor in given_tensors((args, kwargs))):
            name = type(self.module).__name__
            raise ValueError(f"Row streaming of {name} takes one map and no other tensors of more than two dimensions.")
        batch = self._together(x, kwargs)
        key = (batch, tuple(x.shape[1:]), x.dtype, said((args, kwargs)), _form(self.module))
        schedule = self._schedules.pop(key, None)
        if schedule is None:
            try:
                schedule = plan(trace(self.module, (batch, *x.shape[1:]), x.dtype, args, kwargs))
            except NotByRowsError as reason:
                raise NotByRowsError(
                    f"{type(self.module).__name__} cannot be computed row by row: {reason}. Compute it whole, or, an "
                    "autoencoder, in tiles with enable_vae_tiling(mode='blended')."
                ) from reason.__cause__
        self._schedules[key] = schedule  # the last used is the last one
        while len(self._schedules) > SCHEDULES_KEPT:
            self._schedules.pop(next(iter(self._schedules)), None)  # another thread may have done so
        return schedule

    @staticmethod
    def _together(x: torch.Tensor, kwargs: dict[str, Any]) -> int:
        """How many of a batch are computed at once: all if they are the frames of clips, as a number of frames says."""
        return len(x) if "num_frames" in kwargs and x.ndim == 4 else 1

    def _run(self, x: torch.Tensor, schedule: Schedule, write: RowSink, beside: Any) -> KeptOfOne:
        if torch.is_grad_enabled() and (x.requires_grad or _trains(self.module)):
            raise ValueError("Row streaming keeps nothing for gradients: call it under torch.no_grad(), or disable it.")
        forecast, cache, before = self._forecast(schedule, x.device), _cache_in(*beside), kept_rows(beside)
        rows = forecast.rows
        with without_gradients():
            if cache is not None:
                pages, stores, rows = self._pages_of_clip(x, schedule, cache), cache.stores, cache.rows
            elif before:
                pages, rows = before[0].pages[0], before[0].tier
                stores = {place: kept.stores[0] for place, kept in enumerate(before)}
            else:
                largest = self._largest_of_calls(x, schedule, beside)
                forecast, stores = self._forecast(largest, x.device), {}
                rows, pages = forecast.rows, self._pages(forecast, largest, x.device)
            pages.count_anew()
            kind = DryRun if x.is_meta else Run
            run = kind(self.module, schedule, pages, self._work(schedule), Beside(stores, given_tensors(beside)))
            run(x, write, self.watch or watch_here())
        if cache is not None:
            cache.stores = run.kept
        self._note_room([pages], rows, x.device)
        self.last = RowForecast(rows, pages.peak_bytes, forecast.work, forecast.passes)
        return KeptOfOne(run.kept, pages, rows)

    def _note_room(self, together: list[Pages], tier: Tier, device: torch.device) -> None:
        """Note the bytes of pages that exist at once."""
        blocks = [pages.page_bytes * pages_in_block(meant_type(device)) for pages in together]
        rooms = (-(-pages.peak_bytes // block) * block for pages, block in zip(together, blocks, strict=True))
        self.most_room = max(self.most_room, sum(rooms))
        if meant_device() is not None and tier is Tier.DISK:
            note_stored(sum(pages.peak_bytes for pages in together))

    def _largest_of_calls(self, x: torch.Tensor, schedule: Schedule, beside: Any) -> Schedule:
        """The plan of this call or of those after it that stores most, for a network that keeps frames itself."""
        largest = schedule
        for _ in range(CALLS_AHEAD if schedule.trace.after is not None else 0):
            beside = simulated(beside, schedule.trace)
            try:
                schedule = self.schedule(x, *beside)
            except NotByRowsError:
                break  # later calls have other arguments
            largest = max(largest, schedule, key=lambda each: each.forecast(self._work(each))[0])
        return largest

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
            check_disk(forecast.stored, self.settings.folder)
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
    parts = tuple((name, type(part), _flags(part)) for name, part in module.named_modules())
    weights = (*module.named_parameters(), *module.named_buffers())
    return parts, tuple((name, tensor.shape, tensor.dtype) for name, tensor in weights)


def _flags(part: nn.Module) -> tuple[tuple[str, object], ...]:
    return tuple((name, value) for name, value in vars(part).items() if isinstance(value, (bool, int, float, str)))


def _trains(module: nn.Module) -> bool:
    return module.training and any(weight.requires_grad for weight in module.parameters())


def _put(output: torch.Tensor, first: int, rows: torch.Tensor) -> None:
    output.narrow(-2, first, rows.shape[-2]).copy_(rows)


def _cache_in(args: Any, kwargs: Any) -> FrameCache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, FrameCache)), None)


def _free(device: torch.device) -> int:
    kind = accelerator(device)
    return host_memory().available if kind is None else kind.memory(device).free


def _check_input(x: object) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim not in (4, 5):
        given = list(x.shape) if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"Row streaming needs maps [B, C, H, W] or clips [B, C, F, H, W], and this is {given}.")
