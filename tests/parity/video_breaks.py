"""Ways to break our video transformer on purpose, for a while."""

from __future__ import annotations

import torch.nn.functional as F
from tests.parity import pairs
from torch import nn

from lowtide.models import video_layers


def exact_gelu(_):
    whole = F.gelu
    return pairs.changed(F, "gelu", lambda x, approximate: whole(x))


def other_activation(_):
    return pairs.changed(F, "silu", F.relu)


def other_scale(_):
    def unscaled(q, k, v, mask=None, backend=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=(q.shape[-1] + 1) ** -0.5)

    return pairs.changed(video_layers, "attention", unscaled)


def layer_eps(model):
    return pairs.other_eps(model, nn.LayerNorm, 1e-4)


def turned_back(_):
    whole = video_layers.rotate
    return pairs.changed(video_layers, "rotate", lambda x, rotary: whole(x, (rotary[0], -rotary[1])))


def gates_swapped(_):
    whole = video_layers._gated_sum
    return pairs.changed(
        video_layers, "_gated_sum", lambda x, fresh, text_gate, gate, text: whole(x, fresh, gate, text_gate, text)
    )


def shifted_convolution(model):
    projection = model.patch_embed.proj
    return pairs.changed(projection, "forward", lambda x: type(projection).forward(projection, x.flip(-1)))
