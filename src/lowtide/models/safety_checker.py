"""The published safety checker: a CLIP vision tower whose embedding is compared with those of unwanted concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import CLIPConfig, CLIPVisionModel

from lowtide.casting.casting import Casting
from lowtide.configs import write_json
from lowtide.models.bounded_build import build_on_meta
from lowtide.models.foreign import read_foreign_config, reading
from lowtide.models.foreign_configs import SafetyCheckerEntries
from lowtide.models.put_weights import Offload, put_weights, resting_state
from lowtide.weights.fill import state_names
from lowtide.weights.index import CheckpointIndex, find_weights
from lowtide.weights.names import SAFETY_CHECKER_NAMES, apply_names
from lowtide.weights.save import save_tensors

CONCEPTS, SPECIAL_CONCEPTS = 17, 3
SPECIAL_MARGIN = 0.01


class StableDiffusionSafetyChecker(nn.Module):
    """Find pictures near an unwanted concept (Rando et al. 2022, sec. 2 describe the published checker).

    Layout: `config.json` of a CLIP model, `model.safetensors`. Embeddings are `[concepts, projection_dim]`, and the
    weights beside them are the cosine similarities above which a concept counts as seen.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        vision: Any = config.vision_config
        projection: Any = config.projection_dim
        self.vision_model = CLIPVisionModel(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, projection, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, projection))
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL_CONCEPTS, projection))
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL_CONCEPTS))

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None,
        variant: str | None = None,
        offload: Offload | None = None,
        casting: Casting | None = None,
    ) -> Self:
        """Load from a local folder; `dtype` None keeps the file's. Raises as `ModelMixin.from_pretrained`."""
        entries = read_foreign_config(folder, SafetyCheckerEntries, cls.__name__)
        weights = find_weights(folder, "model", variant)
        model = cls.on_meta(folder, entries, weights)
        index = apply_names(weights, SAFETY_CHECKER_NAMES, state_names(model))
        put_weights(model, index, dtype=dtype, offload=offload, casting=casting, buffers=position_ids(model))
        return model.eval()

    @classmethod
    def on_meta(cls, folder: Path, entries: SafetyCheckerEntries, weights: CheckpointIndex | None) -> Self:
        """The checker that the configuration in a folder describes, on meta, no larger than its `weights`."""
        with reading(folder, cls.__name__):
            config = CLIPConfig(**entries.entries())
            return build_on_meta(lambda: cls(config), folder / "config.json", entries.vision_config.entries(), weights)

    def write_to(self, folder: Path, *, variant: str | None, max_shard_size: int | str | None) -> None:
        """Write configuration and weights into an existing folder, under the published names."""
        write_json(folder / "config.json", self.config.to_dict())
        tensors = {_published(name): tensor for name, tensor in resting_state(self).items()}
        save_tensors(tensors, folder, "model", variant=variant, max_shard_size=max_shard_size)

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


def position_ids(model: nn.Module) -> dict[str, torch.Tensor]:
    """CLIP's buffers of token positions `[1, N]`, which no checkpoint holds."""
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("position_ids")]
    return {name: torch.arange(buffer.shape[-1])[None] for name, buffer in buffers}


def _cosine(a_BP: torch.Tensor, b_KP: torch.Tensor) -> torch.Tensor:
    return (nn.functional.normalize(a_BP) @ nn.functional.normalize(b_KP).T).float()


def _published(name: str) -> str:
    nested = name.startswith("vision_model.") and not name.startswith("vision_model.vision_model.")
    return f"vision_model.{name}" if nested else name
