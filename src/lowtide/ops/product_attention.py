"""Attention as products of some rows of scores at a time, by the library that multiplies fastest on this processor.

PyTorch's kernel for CPUs multiplies by MKL; see `lowtide.ops.product` for why that is slow on some. Of many tokens,
this takes 0.6 to 0.8 of its time on an AMD EPYC. Scores of some rows stay in the cache until they are used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowtide.ops.meta_device import device_type
from lowtide.ops.modes import is_traced
from lowtide.ops.packed import packed_product
from lowtide.ops.product import BY_ONEDNN, scratchpad

MANY_SCORES = 2**20
"""With fewer for one head PyTorch's kernel is as fast."""
SCORES = 2**20
"""Scores that are held at once, if that is a number of rows between the least and the most."""
LEAST_ROWS, MOST_ROWS = 64, 512


def is_by_products(q_BNLH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor) -> bool:
    """Whether attention without a mask and without gradients is computed here, on meta as where it is run."""
    is_usual = q_BNLH.dtype == k_BNSH.dtype == v_BNSH.dtype == torch.float32
    is_here = BY_ONEDNN and device_type(q_BNLH) == "cpu"
    return is_usual and is_here and not is_traced() and q_BNLH.shape[-2] * k_BNSH.shape[-2] >= MANY_SCORES


def product_attention(
    q_BNLH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Softmax(scale · q kᵀ) v, `scale` 1/√H unless given: `[B, N, L, V]` of k `[B, N, S, H]` and v `[B, N, S, V]`."""
    batch, heads, queries, width = q_BNLH.shape
    keys, out_width = v_BNSH.shape[-2:]
    rows = min(max(LEAST_ROWS, SCORES // keys), MOST_ROWS)
    if q_BNLH.is_meta:
        one_head = keys * (width + out_width) + min(rows, queries) * (keys + width + out_width)
        room = q_BNLH.new_empty(one_head + max(scratchpad(width), scratchpad(keys)))
        made = F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, scale=scale)
        del room
        return made
    out_BLNV = q_BNLH.new_empty(batch, queries, heads, out_width)
    factor = width**-0.5 if scale is None else scale
    for picture in range(batch):
        for head in range(heads):
            k_SH, v_VS = k_BNSH[picture, head] * factor, v_BNSH[picture, head].t().contiguous()
            for start in range(0, queries, rows):
                part = slice(start, start + rows)
                scores = packed_product(q_BNLH[picture, head, part].contiguous(), k_SH, None)
                torch.ops.aten._softmax.out(scores, -1, False, out=scores)
                out_BLNV[picture, part, head] = packed_product(scores, v_VS, None)
                del scores  # before there are the next
            del k_SH, v_VS
    return out_BLNV.transpose(1, 2)
