"""The ways in which a guest's autoencoder decodes: at once, picture by picture, row by row, in blended tiles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowtide.activations.row_streaming import (
    RowSettings,
    apply_row_streaming,
    remove_row_streaming,
    row_streaming_of,
)
from lowtide.pipelines.decode_ways import ROWS, by_rows
from lowtide.planning.workload import BLENDED, EXACT_ON_DISK, SLICED, WHOLE, Call, Work

_FLAGS = ("use_slicing", "use_tiling")
_SET = "_lowtide_flags"
"""An entry of an autoencoder: what a plan last set the flags to. One that is otherwise now was set by hand since."""
_LEVELS = 4
"""How often rows are written and read again, at the usual number of an autoencoder's levels."""


def _decodes_at_once(network: Any) -> bool:
    """Whether an autoencoder can do without its tiles: one that has only these says so before it looks at anything.

    Asked is a stand-in that has the network's settings and none of its parts, so that nothing is computed or brought.
    """
    if not hasattr(network, "use_tiling"):
        return True
    stand_in = object.__new__(type(network))
    stand_in.__dict__ |= {**network.__dict__, "_modules": {}, **dict.fromkeys(_FLAGS, False)}
    stand_in.__dict__.pop("_hf_hook", None)
    try:
        type(network).decode(stand_in, object())
    except NotImplementedError:
        return False
    except Exception:  # whatever it wants to do first with a picture that is none
        return True
    return True


def in_tiles_where_it_must(network: Any) -> Any:
    """The network; one that can only decode in tiles has these turned on, without which its pipeline cannot be run."""
    if not _decodes_at_once(network):
        network.enable_tiling()
    return network


class GuestDecode:
    """Sets how an autoencoder decodes, and traces what each way takes; see `lowtide.fitting.subject.Ways`."""

    settings: Collection[str] = (*_FLAGS, _SET)

    def __init__(self, autoencoder: Any) -> None:
        self._autoencoder = autoencoder

    @classmethod
    def for_(cls, network: nn.Module) -> GuestDecode | None:
        """The ways of a network, if it is an autoencoder with a decoder of its own.

        One that cannot decode at once has none, and decodes as it is set.
        """
        decoder, decode = getattr(network, "decoder", None), getattr(network, "decode", None)
        if not isinstance(decoder, nn.Module) or not callable(decode):
            return None
        return cls(network) if _decodes_at_once(network) else None

    def set(self, way: str) -> None:
        """Decode in one of the ways of `lowtide.planning.workload.WAYS`."""
        autoencoder = self._autoencoder
        for name, is_on in (("use_slicing", way == SLICED), ("use_tiling", way == BLENDED)):
            if hasattr(autoencoder, name):
                setattr(autoencoder, name, is_on)
        autoencoder.__dict__[_SET] = self._flags()
        rows = ROWS.get(way)
        streaming = row_streaming_of(autoencoder.decoder)
        if rows is None:
            remove_row_streaming(autoencoder.decoder)
        elif streaming is None or streaming.settings != RowSettings.of(rows, None, None, None):
            apply_row_streaming(autoencoder.decoder, rows=rows)

    def tiles_by_hand(self, way: str) -> bool:
        """Whether tiles were turned on since this way was set, which has none."""
        return way != BLENDED and _SET in self._autoencoder.__dict__ and self._flags().get("use_tiling", False)

    def _flags(self) -> dict[str, bool]:
        return {name: getattr(self._autoencoder, name) for name in _FLAGS if hasattr(self._autoencoder, name)}

    def now(self) -> tuple[Any, ...]:
        """How it decodes now, to be put back."""
        return self._flags(), row_streaming_of(self._autoencoder.decoder)

    def put_back(self, before: Any) -> None:
        """Decode as when `now` was asked; flags that were set by hand since a plan set them stay so."""
        flags, streaming = before
        remove_row_streaming(self._autoencoder.decoder)
        ours, now = self._autoencoder.__dict__.pop(_SET, {}), self._flags()
        for name, value in flags.items():
            if now[name] == ours.get(name, now[name]):
                setattr(self._autoencoder, name, value)
        if streaming is not None:
            self._autoencoder.decoder.__dict__["forward"] = streaming

    def traced(
        self, names: Sequence[str], inputs: Sequence[torch.Tensor], trace: Callable[[], Call], whole: Work
    ) -> dict[str, Call]:
        """What the ways called `names` take that the autoencoder offers for this picture or clip."""
        calls: dict[str, Call] = {}
        for way in names:
            if not self._offers(way, inputs):
                continue
            with self._trying(way):
                call = trace()
                calls |= self._with_rows(call, whole) if way == EXACT_ON_DISK else {way: call}
        return calls

    @contextmanager
    def _trying(self, way: str) -> Iterator[None]:
        """Set to a way; what cannot be gone through in it is left out."""
        try:
            self.set(way)
            yield
        except (ValueError, TypeError, AttributeError, RuntimeError):
            pass  # a decoder that does not go by rows, or not for these inputs
        finally:
            self.set(WHOLE)

    def _offers(self, way: str, inputs: Sequence[torch.Tensor]) -> bool:
        if way == SLICED:
            return hasattr(self._autoencoder, "use_slicing") and bool(inputs) and len(inputs[0]) > 1
        return hasattr(self._autoencoder, "use_tiling") if way == BLENDED else True

    def _with_rows(self, call: Call, whole: Work) -> dict[str, Call]:
        itemsize = next(self._autoencoder.parameters()).itemsize
        return by_rows(self._autoencoder.decoder, call, whole, levels=_LEVELS, itemsize=itemsize)
