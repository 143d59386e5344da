"""A run on meta: the memory of a streamed run without its arithmetic, and without most of its bands.

Bands in the middle of a pass are alike. The first ones are gone through, as ever; of the others, which take no more,
only the pages that they fill and leave are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowtide.activations.graph import Span
from lowtide.activations.passes import Pass
from lowtide.activations.run import RowSink, Run
from lowtide.ops.statistics import ChannelStatistics

GONE_THROUGH = 2
"""Bands of a pass: the first, which has no rows above it, and one that has rows on both sides."""


class _FirstPart(ChannelStatistics):
    """Statistics of the first part alone: the others take no more memory."""

    def parts(self, entries_EC: torch.Tensor) -> Sequence[torch.Tensor]:
        """The first part."""
        return super().parts(entries_EC)[:1]


class DryRun(Run):
    """One run of a schedule over an input on meta."""

    new_statistics = _FirstPart

    def _sweep(self, one: Pass, spans: list[Span], write: RowSink) -> None:
        for place, span in enumerate(spans):
            if place < GONE_THROUGH:
                self._band(one, span, write)
            else:
                self._count_band(one, span)
            self._told()

    def _count_band(self, one: Pass, span: Span) -> None:
        self._let_go(one, one.spans(span), span)
        for target in one.targets:
            if target is not self.schedule.trace.output:
                self._stores[target].reserve(span[0], (span[1] - span[0]) * target.row_bytes)
