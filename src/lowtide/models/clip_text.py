"""CLIP's text encoder (Radford et al. 2021, sec. 2.4): tokens to the states that Stable Diffusion is conditioned on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lowtide.models.clip_layers import CLIPEncoder
from lowtide.models.encoder_configs import CLIPTextEntries
from lowtide.models.encoder_outputs import PooledEncoderOutput, refuse_attentions
from lowtide.models.transformers_layout import TransformersLayout
from lowtide.weights.names import CLIP_TEXT_NAMES, NameTable

END_BY_SIZE = 2
"""`eos_token_id` of older configurations: a text ends at its largest number, whichever that is."""


class CLIPTextEmbeddings(nn.Module):
    """A vector for each token, and one for each place, added."""

    def __init__(self, config: CLIPTextEntries) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids_BL: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings `[B, L, C]`; `positions` `[1, L]` or `[B, L]` are 0, 1, 2, ... if None."""
        length, most = ids_BL.shape[-1], self.position_embedding.num_embeddings
        if length > most:
            raise ValueError(f"A text of {length} tokens is too long: this text encoder has {most} positions.")
        if positions is None:
            positions = torch.arange(length, device=ids_BL.device)[None]
        return self.token_embedding(ids_BL) + self.position_embedding(positions)


class CLIPTextModel(TransformersLayout):
    """The text encoder of Stable Diffusion 1.x and 2.x, with the names and outputs of the class in `transformers`.

    Shapes: `B` texts of `L` tokens, states of width `C`.
    """

    config_class = CLIPTextEntries
    names: ClassVar[NameTable] = CLIP_TEXT_NAMES
    prefixes: ClassVar[tuple[str, str]] = ("", "text_model.")
    model_type: ClassVar[str] = "clip_text_model"

    def __init__(self, config: CLIPTextEntries) -> None:
        super().__init__(config)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.eos_token_id = config.eos_token_id

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> PooledEncoderOutput | tuple[Any, ...]:
        """Encode tokens `[B, L]`: normalised states `[B, L, C]`, and of these the one where each text ends, `[B, C]`.

        `attention_mask` `[B, L]` is 0 for tokens that none may see. `hidden_states` are not normalised.
        """
        refuse_attentions(output_attentions)
        ids_BL = input_ids.view(-1, input_ids.shape[-1])
        kept: list[torch.Tensor] | None = [] if output_hidden_states else None
        x_BLC = self.embeddings(ids_BL, position_ids)
        x_BLC = self.encoder(x_BLC, causal_mask(attention_mask), kept)
        x_BLC = self.final_layer_norm(x_BLC)
        ends_B = self._ends(ids_BL)
        pooled_BC = x_BLC[torch.arange(len(x_BLC), device=x_BLC.device), ends_B.to(x_BLC.device)]
        output = PooledEncoderOutput(x_BLC, pooled_BC, None if kept is None else tuple(kept))
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the tokens' vectors."""
        return self.embeddings.token_embedding

    def _ends(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The place where each text ends: the first end token, which fills up short texts too."""
        end = self.eos_token_id
        if end is None or end == END_BY_SIZE:
            return ids_BL.int().argmax(dim=-1)
        if isinstance(end, tuple):
            return torch.isin(ids_BL, torch.tensor(end, device=ids_BL.device)).int().argmax(dim=-1)
        return ids_BL.eq(end).int().argmax(dim=-1)


def causal_mask(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """What each token may see, `[B, 1, L, L]`: itself and those before it that are not masked; None where none is."""
    if attention_mask is None or (attention_mask.device.type != "meta" and bool(attention_mask.all())):
        return None
    length = attention_mask.shape[-1]
    before = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril_()
    return before & attention_mask.bool()[:, None, None, :]
