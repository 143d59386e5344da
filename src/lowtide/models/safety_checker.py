"""The published safety checker: a CLIP vision tower whose embedding is compared with those of unwanted concepts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lowtide.models.clip_vision import CLIPVisionModel
from lowtide.models.encoder_configs import SafetyCheckerEntries
from lowtide.models.transformers_layout import TransformersLayout
from lowtide.weights.names import SAFETY_CHECKER_NAMES, NameTable

CONCEPTS, SPECIAL_CONCEPTS = 17, 3
SPECIAL_MARGIN = 0.01


class StableDiffusionSafetyChecker(TransformersLayout):
    """Find pictures near an unwanted concept (Rando et al. 2022, sec. 2 describe the published checker).

    Layout: `config.json` of a CLIP model, `model.safetensors`. Embeddings are `[concepts, projection_dim]`, and the
    weights beside them are the cosine similarities above which a concept counts as seen.
    """

    config_class = SafetyCheckerEntries
    config: SafetyCheckerEntries
    library: ClassVar[str] = "stable_diffusion"
    names: ClassVar[NameTable] = SAFETY_CHECKER_NAMES
    prefixes: ClassVar[tuple[str, str]] = ("vision_model.", "vision_model.vision_model.")
    model_type: ClassVar[str] = "clip"

    def __init__(self, config: SafetyCheckerEntries) -> None:
        super().__init__(config)
        width, projection = config.vision_config.hidden_size, config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(width, projection, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, projection))
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL_CONCEPTS, projection))
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL_CONCEPTS))

    @torch.no_grad()
    def forward(self, clip_input: torch.Tensor) -> list[bool]:
        """Whether each picture shows an unwanted concept; `clip_input` is `[B, 3, 224, 224]`, normalised for CLIP."""
        embeds_BP = self.visual_projection(self.vision_model(clip_input).pooler_output)
        special = _cosine(embeds_BP, self.special_care_embeds) - self.special_care_embeds_weights.float()
        # A picture near a special concept is judged more strictly. Scores are rounded as the published checker does.
        margin = SPECIAL_MARGIN * (special.mul(1000).round() > 0).any(dim=1, keepdim=True)
        scores = _cosine(embeds_BP, self.concept_embeds) - self.concept_embeds_weights.float() + margin
        return (scores.mul(1000).round() > 0).any(dim=1).tolist()


def is_published_checker(checker: object) -> bool:
    """Whether a pipeline's checker is that of the checkpoints, and not a script's own."""
    return isinstance(checker, StableDiffusionSafetyChecker)


def _cosine(a_BP: torch.Tensor, b_KP: torch.Tensor) -> torch.Tensor:
    return (nn.functional.normalize(a_BP) @ nn.functional.normalize(b_KP).T).float()
