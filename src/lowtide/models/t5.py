"""T5's encoder (Raffel et al. 2020): tokens to the states that CogVideoX is conditioned on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lowtide.models.encoder_configs import T5Entries
from lowtide.models.encoder_outputs import EncoderOutput, refuse_attentions
from lowtide.models.t5_layers import T5Block, T5LayerNorm
from lowtide.models.transformers_layout import TransformersLayout
from lowtide.weights.names import T5_NAMES, NameTable


class T5Stack(nn.Module):
    """The table of tokens, the blocks and the last norm."""

    def __init__(self, config: T5Entries, shared: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model, _weight=shared.weight)
        self.embed_tokens.weight = shared.weight
        self.block = nn.ModuleList([T5Block(config, holds_bias=layer == 0) for layer in range(config.num_layers)])
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def forward(
        self,
        ids_BL: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        embeds_BLC: torch.Tensor | None = None,
        kept: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Compute the normalised states of the last block; `kept` is given what each block reads."""
        x_BLC: torch.Tensor = self.embed_tokens(ids_BL) if embeds_BLC is None else embeds_BLC
        bias_BNLL: torch.Tensor | None = None
        for block in self.block:
            if kept is not None:
                kept.append(x_BLC)
            x_BLC, bias_BNLL = block(x_BLC, mask, bias_BNLL)
        return self.final_layer_norm(x_BLC)


class T5EncoderModel(TransformersLayout):
    """The text encoder of CogVideoX, with the names and outputs of the class in `transformers`.

    Shapes: `B` texts of `L` tokens, states of width `C`. `shared` and `encoder.embed_tokens` are one table.
    """

    config_class = T5Entries
    names: ClassVar[NameTable] = T5_NAMES
    model_type: ClassVar[str] = "t5"
    float32_beside_float16: ClassVar[tuple[str, ...]] = ("*.DenseReluDense.wo.weight",)

    def __init__(self, config: T5Entries) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, self.shared)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Encode tokens `[B, L]`, or embeddings `[B, L, C]` in their place: states `[B, L, C]`.

        `attention_mask` `[B, L]` is 0 for tokens that none may see.
        """
        refuse_attentions(output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        kept: list[torch.Tensor] | None = [] if output_hidden_states else None
        x_BLC = self.encoder(input_ids, mask, inputs_embeds, kept)
        output = EncoderOutput(x_BLC, None if kept is None else (*kept, x_BLC))
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of the tokens' vectors."""
        return self.shared
