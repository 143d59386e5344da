"""Row streaming on the meta device: what a run takes in memory, without its arithmetic and most of its bands.

Bands in the middle of a pass take nearly the same memory. So the first, the largest and the last bands of a pass are
gone through, and for the others only the pages that they take and give back are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowtide.activations.bands import Pass
from lowtide.activations.graph import Span
from lowtide.activations.run import RowSink, Run
from lowtide.ops.statistics import ChannelStatistics

GONE_THROUGH = 2
"""Bands at each end of a pass: one at the edge of the map, and one that has rows on both sides. At the end of a pass
the most rows are stored."""


class _FirstPart(ChannelStatistics):
    """Statistics of the first part alone, since the other parts take no more memory."""

    def parts(self, entries_EC: torch.Tensor) -> Sequence[torch.Tensor]:
        """The first part."""
        return super().parts(entries_EC)[:1]


class DryRun(Run):
    """One run of a schedule over an input on meta."""

    new_statistics = _FirstPart

    def _sweep(self, pass_: Pass, spans: list[Span], write: RowSink) -> None:
        largest = max(range(len(spans)), key=lambda place: pass_.bytes_of(spans[place]), default=0)
        for place, span in enumerate(spans):
            if place < GONE_THROUGH or place >= len(spans) - GONE_THROUGH or place == largest:
                self._band(pass_, span, write)
            else:
                self._count_band(pass_, span)
            self._band_done()

    def _count_band(self, pass_: Pass, span: Span) -> None:
        self._let_go(pass_, pass_.spans(span), span)
        for target in pass_.targets:
            if target is not self.schedule.trace.output:
                self._stores[target].reserve(span[0], (span[1] - span[0]) * target.row_bytes)
