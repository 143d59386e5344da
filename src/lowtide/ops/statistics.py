"""Mean and variance of the channels of a map, taken from a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

PARTIAL_ENTRIES = 2**18
"""Numbers summed at once in single precision; the sums are joined in double precision."""


class ChannelStatistics:
    """Count, mean and sum of squared deviations of every channel, over all parts added so far.

    Parts are joined as in Chan, Golub & LeVeque 1983, eq. 2.1, in float64, so neither a large mean nor many parts cost
    precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_C: torch.Tensor | None = None
        self.squares_C: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add a part `[1, C, ...]` of the map."""
        entries_EC = x.movedim(1, -1).reshape(-1, x.shape[1])
        for part_EC in self.parts(entries_EC):
            wide_EC = part_EC if part_EC.dtype == torch.float64 else part_EC.float()
            mean_C = wide_EC.mean(0)
            squares_C = (wide_EC - mean_C).square_().sum(0)
            self._join(len(part_EC), mean_C.double(), squares_C.double())

    def parts(self, entries_EC: torch.Tensor) -> Sequence[torch.Tensor]:
        """Entries `[E, C]` in parts, each of which is summed at once."""
        return entries_EC.split(max(1, PARTIAL_ENTRIES // entries_EC.shape[1]))

    def _join(self, count: int, mean_C: torch.Tensor, squares_C: torch.Tensor) -> None:
        if self.mean_C is None or self.squares_C is None:
            self.count, self.mean_C, self.squares_C = count, mean_C, squares_C
            return
        total, difference_C = self.count + count, mean_C - self.mean_C
        self.squares_C = self.squares_C + squares_C + difference_C.square() * (self.count * count / total)
        self.mean_C = self.mean_C + difference_C * (count / total)
        self.count = total

    def scale_and_shift(
        self, groups: int, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors `[C]` and terms `[C]`, in float64, so that x · factor + term is the group norm of x."""
        assert self.mean_C is not None
        assert self.squares_C is not None
        mean_GC, squares_GC = self.mean_C.view(groups, -1), self.squares_C.view(groups, -1)
        mean_G1 = mean_GC.mean(1, keepdim=True)
        spread_G1 = squares_GC.sum(1, keepdim=True) + self.count * (mean_GC - mean_G1).square().sum(1, keepdim=True)
        factor_G1 = torch.rsqrt(spread_G1 / (self.count * mean_GC.shape[1]) + eps)
        factor_C = factor_G1.expand_as(mean_GC).flatten()
        shift_C = -mean_G1.expand_as(mean_GC).flatten()
        if weight_C is not None:
            factor_C = factor_C * weight_C.double()
        term_C = shift_C * factor_C
        return factor_C, term_C if bias_C is None else term_C + bias_C.double()
