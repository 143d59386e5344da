"""CLIP's vision tower (Radford et al. 2021; Dosovitskiy et al. 2021): a picture in patches, each one a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lowtide.models.clip_layers import CLIPEncoder
from lowtide.models.encoder_configs import CLIPVisionEntries
from lowtide.models.encoder_outputs import PooledEncoderOutput, refuse_attentions
from lowtide.models.transformers_layout import TransformersLayout
from lowtide.weights.names import CLIP_VISION_NAMES, NameTable


class CLIPVisionEmbeddings(nn.Module):
    """A vector for the whole picture and one for each patch, with one for each place added."""

    def __init__(self, config: CLIPVisionEntries) -> None:
        super().__init__()
        self.side, patch = config.image_size, config.patch_size
        self.tokens = (self.side // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.hidden_size)))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(self.tokens, config.hidden_size)

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, L, C]`, the whole picture's first."""
        height, width = pixels_B3HW.shape[-2:]
        if (height, width) != (self.side, self.side):
            raise ValueError(f"A picture of {width}x{height} pixels does not fit: {self.side}x{self.side} are needed.")
        # The weight's dtype is that of computing, wherever the weight rests.
        patches_BLC = self.patch_embedding(pixels_B3HW.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        whole_B1C = self.class_embedding.expand(len(pixels_B3HW), 1, -1)
        places = torch.arange(self.tokens, device=pixels_B3HW.device)[None]
        return torch.cat([whole_B1C, patches_BLC], dim=1) + self.position_embedding(places)


class CLIPVisionModel(TransformersLayout):
    """The tower inside the safety checker, with the names and outputs of the class in `transformers`.

    Shapes: `B` pictures `[B, 3, H, W]` of the configuration's size, `L` tokens, states of width `C`.
    """

    config_class = CLIPVisionEntries
    names: ClassVar[NameTable] = CLIP_VISION_NAMES
    prefixes: ClassVar[tuple[str, str]] = ("", "vision_model.")
    model_type: ClassVar[str] = "clip_vision_model"

    def __init__(self, config: CLIPVisionEntries) -> None:
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> PooledEncoderOutput | tuple[Any, ...]:
        """Encode pictures: states `[B, L, C]`, and the whole picture's, normalised, `[B, C]`."""
        refuse_attentions(output_attentions)
        kept: list[torch.Tensor] | None = [] if output_hidden_states else None
        x_BLC = self.pre_layrnorm(self.embeddings(pixel_values))
        x_BLC = self.encoder(x_BLC, None, kept)
        pooled_BC = self.post_layernorm(x_BLC[:, 0, :])
        output = PooledEncoderOutput(x_BLC, pooled_BC, None if kept is None else tuple(kept))
        return output.to_tuple() if return_dict is False else output
