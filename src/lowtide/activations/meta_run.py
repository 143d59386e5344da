"""Row streaming on the meta device: what a run takes in memory, without its arithmetic and most of its bands.

Bands in the middle of a pass take nearly the same memory. So the first bands of a pass are gone through, and of the
largest and the last those that take more than any before them. For the others only the pages that they take and give
back are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowtide.activations.bands import Pass
from lowtide.activations.graph import Span
from lowtide.activations.pages import NoPages
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
        sizes, most = [pass_.bytes_of(span) for span in spans], 0
        candidates = {sizes.index(max(sizes)), *range(len(spans) - GONE_THROUGH, len(spans))} if sizes else set()
        for place, span in enumerate(spans):
            taken = sizes[place] + self._stored_bytes()
            if place < GONE_THROUGH or (place in candidates and taken > most):
                most = max(most, taken)
                self._band(pass_, span, write)
            else:
                self._count_band(pass_, span)
            self._band_done()

    def _stored_bytes(self) -> int:
        """Bytes of memory that pages have taken so far."""
        return 0 if isinstance(self.pages, NoPages) else self.pages.peak_bytes

    def _count_band(self, pass_: Pass, span: Span) -> None:
        self._let_go(pass_, pass_.spans(span), span)
        for target in pass_.targets:
            if target is not self.schedule.trace.output:
                self._stores[target].reserve(span[0], (span[1] - span[0]) * target.row_bytes)
