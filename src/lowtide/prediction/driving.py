"""Drive code that calls networks on meta: which network it calls when, what each call takes, and what is between.

The code may be anyone's: it computes with real numbers outside the networks; see `lowtide.prediction.absent_numbers`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowtide.memory.overrides import Overrides
from lowtide.ops.meta_device import standing_for, taken_note
from lowtide.ops.modes import without_gradients
from lowtide.planning.workload import Call, Work
from lowtide.prediction.absent_numbers import PICTURE_BYTES, TooManyNumbersError, absent_numbers, on_meta
from lowtide.prediction.repeated_modules import Repeats, Segment
from lowtide.prediction.traced_memory import Memory
from lowtide.prediction.tracing import Rewritten, Watch, spare_of

FORWARD = "forward"


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network by its `entry`, "forward" or the name of a method.

    The peak of the `call` counts all that is alive, `before` bytes of it before the call; `after` is the peak from its
    end to the next call. The first call of an entry has `segments`, and `inputs` like those it had.
    """

    network: str
    entry: str
    before: int
    call: Call
    after: int
    segments: tuple[Segment, ...] = ()
    inputs: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Driven:
    """The calls of a run in order; the highest peak of all of it, and that `before` the first call, in bytes."""

    calls: tuple[NetworkCall, ...]
    peak: int
    before: int


def drive(
    run: Callable[[], Any],
    networks: Mapping[str, nn.Module],
    *,
    entries: Collection[str],
    device: str = "cpu",
    repeats: Repeats | None = None,
) -> Driven:
    """Call `run` as if its `networks`, which are on meta, computed on a `device` of this type ("cpu" or "cuda").

    `entries` names methods of networks that are calls of them besides `forward`. `repeats` remembers what was seen in
    earlier drives of the same networks. Raises what `run` raises.
    """
    memory = Memory.of(device)
    watch = Watch(memory, repeats or Repeats())
    following = _Following(memory, watch)
    with (
        without_gradients(), standing_for(device), watch.seeing(networks.values()), following.around(networks, entries),
        watch, Rewritten(memory), absent_numbers() as absent,
    ):  # fmt: skip
        taken_note()
        try:
            result = run()
            del result
        except TooManyNumbersError:
            pass
        memory.reached(PICTURE_BYTES * absent.read)
    return following.finished()


class _Following:
    """Follows the calls of networks from outside."""

    def __init__(self, memory: Memory, watch: Watch) -> None:
        self._memory = memory
        self._watch = watch
        self._calls: list[NetworkCall] = []
        self._before = 0
        self._is_inside = False

    @contextmanager
    def around(self, networks: Mapping[str, nn.Module], entries: Collection[str]) -> Generator[None]:
        """While this lasts, calls of these networks are followed."""
        overrides = Overrides()
        try:
            for name, network in networks.items():
                overrides.set(network, "_call_impl", self._followed(name, FORWARD, network._call_impl))
                for entry in entries:
                    method = getattr(network, entry, None)
                    if callable(method) and not isinstance(method, nn.Module):
                        overrides.set(network, entry, self._followed(name, entry, method))
            yield
        finally:
            overrides.put_back()

    def _followed(self, network: str, entry: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def followed_call(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return call(*args, **kwargs)
            return self._follow(network, entry, call, args, kwargs)

        return followed_call

    def _follow(self, network: str, entry: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        is_first = all((earlier.network, earlier.entry) != (network, entry) for earlier in self._calls)
        inputs = on_meta((args, kwargs), anew=True) if is_first else None
        self._end_of_gap()
        self._watch.close_segment()
        before, begun = self._memory.alive, len(self._watch.segments)
        alive, earlier = list(self._memory.sizes.items()), len(self._memory.events or ())
        self._is_inside = True
        try:
            result = call(*args, **kwargs)
        finally:
            self._is_inside = False
            self._watch.close_segment()
        workspace, peak = self._memory.workspace, self._begun_anew()
        segments = tuple(self._watch.segments[begun:])
        del self._watch.segments[begun:]
        work = sum((segment.work for segment in segments), Work())
        events = self._memory.events
        spare = 0 if events is None else spare_of([*alive, *events[earlier:]], peak)
        seen = Call(peak, workspace, self._memory.alive - before, work, taken_note(), spare=spare)
        kept = segments if is_first else ()
        self._calls.append(NetworkCall(network, entry, before, seen, 0, kept, inputs))
        return result

    def _end_of_gap(self) -> None:
        """What was alive at most since the last call belongs to it, and before the first one to nobody."""
        peak = self._begun_anew()
        if self._calls:
            self._calls[-1] = replace(self._calls[-1], after=peak)
        else:
            self._before = peak

    def _begun_anew(self) -> int:
        """The peak so far; from now on another one counts."""
        peak = self._memory.peak
        self._memory.peak = self._memory.workspace = 0
        self._memory.reached(0)
        return peak

    def finished(self) -> Driven:
        """What was seen."""
        self._end_of_gap()
        peaks = [max(call.call.peak, call.after) for call in self._calls]
        return Driven(tuple(self._calls), max([self._before, *peaks]), self._before)
