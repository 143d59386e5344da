"""How fast this processor computes in each dtype: measured once, in a second, and kept.

In a dtype that it has no instructions for, a processor may take a hundred times as long; such are measured on the
smallest shapes alone.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import lowtide
from lowtide.machine.announce import announce
from lowtide.machine.child_process import ChildError, run_module
from lowtide.machine.figure_cache import cache_folder, keep, recall
from lowtide.machine.host import host_memory, processor_name_and_flags, usable_cpus
from lowtide.machine.processor_share import Watch, is_busy
from lowtide.ops.product import linear

DTYPES = ("float32", "bfloat16", "float16")
_FORMAT = 2
_ROOM = 600 * 2**20
"""Bytes that the process which measures takes, with some room."""
_MEASURED_IN = 60.0
_CONVOLUTIONS = ((1, 96, 16), (2, 320, 32), (2, 640, 32))
"""Maps, their channels and their side, from the smallest on."""
_PRODUCTS = ((64, 320, 320), (512, 640, 2560), (1024, 1280, 5120))
_ATTENTIONS = ((128, 8, 40), (1024, 8, 64))
_ELEMENTS = (2**16, 2**21)
_SLOW = 4e-3
"""Seconds of a kernel from which on no larger shape is tried."""
_ENOUGH, _HOPELESS = 0.03, 0.3
"""Seconds after which a kernel is not repeated, but for the fewest times; and those from which on not even that."""
_FEWEST, _MOST = 2, 5
"""How often a kernel is repeated: once is too few where it is made at its first call, or others come in between."""

Cases = list[tuple[float, Callable[[], object]]]


@dataclass(frozen=True)
class DtypeSpeeds:
    """Operations a second of each kind of work in one dtype; of what is none of these, numbers `touched` a second."""

    convolution: float
    channels_last: float
    product: float
    attention: float
    touched: float


def dtype_speeds(*, refresh: bool = False) -> Mapping[str, DtypeSpeeds] | None:
    """The speeds of this processor by the dtype's name; None where they cannot be measured.

    They are kept in the user's cache folder. Those measured while others were at work are measured again, by another
    process, once these are done. With `refresh` they are measured anew.
    """
    key = _key()
    place = json.dumps([*key, str(cache_folder())])
    if refresh or place not in _asked:
        _asked[place] = _kept_or_measured(key, refresh=refresh)
    return _asked[place]


_asked: dict[str, Mapping[str, DtypeSpeeds] | None] = {}
"""What this process was told, so that it computes in one dtype all along."""


def _kept_or_measured(key: list[Any], *, refresh: bool) -> Mapping[str, DtypeSpeeds] | None:
    kept = recall("dtype-speeds", key) or {}
    speeds = _read(kept)
    if speeds is not None and not refresh and not (kept.get("busy") and not is_busy(torch.get_num_threads())):
        return speeds
    if host_memory().available < _ROOM:
        return speeds
    announce("Measuring in which dtype this processor is fastest: once, for a second.")
    try:
        figures = _measured_elsewhere()
    except ChildError as error:
        warnings.warn(f"It could not be measured which dtype is fast here: {error}", stacklevel=4)
        return speeds
    keep("dtype-speeds", key, figures)
    return _read(figures)


def _measured_elsewhere() -> Mapping[str, Any]:
    """Measured in a child process, so that what measuring leaves in memory does not stay in this one."""
    return json.loads(run_module(__name__, str(torch.get_num_threads()), seconds=_MEASURED_IN).splitlines()[-1])


def kept_speeds(speeds: Mapping[str, DtypeSpeeds]) -> None:
    """Keep these as the speeds of this processor."""
    keep("dtype-speeds", _key(), {name: asdict(speed) for name, speed in speeds.items()})


def _key() -> list[Any]:
    numbers = (usable_cpus(), torch.get_num_threads())
    return [_FORMAT, lowtide.__version__, torch.__version__, processor_name_and_flags()[0], *numbers]


def _read(figures: Mapping[str, Any]) -> dict[str, DtypeSpeeds] | None:
    names = {field.name for field in fields(DtypeSpeeds)}
    each = [figures.get(dtype) for dtype in DTYPES]
    if not all(isinstance(speed, Mapping) and set(speed) == names for speed in each):
        return None
    if not all(isinstance(value, int | float) and value > 0 for speed in each if speed for value in speed.values()):
        return None
    return {dtype: DtypeSpeeds(**speed) for dtype, speed in zip(DTYPES, each, strict=True) if speed}


def measured_speeds(dtype: torch.dtype) -> DtypeSpeeds:
    """Measure them now, in this process."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape).mul_(0.1).to(dtype)

    def convolutions(layout: torch.memory_format) -> Cases:
        cases: Cases = []
        for count, channels, side in _CONVOLUTIONS:
            x, weight = (
                some(count, channels, side, side).contiguous(memory_format=layout),
                some(channels, channels, 3, 3),
            )
            cases.append((18 * count * channels**2 * side**2, partial(F.conv2d, x, weight, padding=1)))
        return cases

    products: Cases = [(2 * m * k * n, partial(linear, some(m, k), some(n, k))) for m, k, n in _PRODUCTS]
    attentions: Cases = []
    for tokens, heads, size in _ATTENTIONS:
        q = some(1, heads, tokens, size)
        attentions.append((4 * heads * tokens**2 * size, partial(F.scaled_dot_product_attention, q, q, q)))
    with torch.inference_mode():
        return DtypeSpeeds(
            convolution=_speed(convolutions(torch.contiguous_format)),
            channels_last=_speed(convolutions(torch.channels_last)),
            product=_speed(products),
            attention=_speed(attentions),
            touched=_speed([(3 * count, partial(_touch, some(count // 256, 256))) for count in _ELEMENTS]),
        )


def _touch(x: torch.Tensor) -> torch.Tensor:
    return F.silu(F.layer_norm(x, (256,)) + x)


def _speed(cases: Cases) -> float:
    """Amounts of work a second in the largest case that is not slow, or the first one that is."""
    speed = 0.0
    for work, action in cases:
        seconds = _least(action)
        speed = work / seconds
        if seconds > _SLOW:
            break
    return speed


def _least(action: Callable[[], object]) -> float:
    """The least seconds of some runs, after one to warm up."""
    taken = [_once(action)]
    while len(taken) <= _MOST and (sum(taken) < _ENOUGH or len(taken) <= _FEWEST) and taken[0] < _HOPELESS:
        taken.append(_once(action))
    return min(taken)


def _once(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return max(time.perf_counter() - start, 1e-9)


def _main(threads: str) -> None:
    torch.set_num_threads(int(threads))
    watch = Watch()
    speeds = {name: asdict(measured_speeds(getattr(torch, name))) for name in DTYPES}
    share = watch.share()
    print(json.dumps({**speeds, **asdict(share), "busy": share.was_busy(int(threads))}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
