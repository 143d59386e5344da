"""Scaled dot-product attention on tensors laid out as `B N L H` (batch, heads, tokens, head size)."""

import torch
import torch.nn.functional as F


def attention(
    q_BNLH: torch.Tensor, k_BNSH: torch.Tensor, v_BNSH: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend from `L` query tokens to `S` key tokens: softmax(q kᵀ / √H + mask) v.

    Shapes: q `[B, N, L, H]`, k and v `[B, N, S, H]`, mask broadcastable to `[B, N, L, S]` (boolean: True attends;
    floating: added to the scores). Returns `[B, N, L, H]` in the dtype of q. Source: Vaswani et al. 2017, eq. 1.
    """
    return F.scaled_dot_product_attention(q_BNLH, k_BNSH, v_BNSH, attn_mask=mask)
