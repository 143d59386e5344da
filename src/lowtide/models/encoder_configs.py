"""Configurations of text encoders and of the safety checker, as `transformers` writes them: what shapes the networks.

Entries that would choose kernels, code, quantization or labels have no effect; Lowtide chooses those itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from lowtide.config_checks import LARGEST, MOST_LAYERS, SMALLEST, Range, check_types
from lowtide.configs import Config

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
MOST_PIXELS = 2048
TOKEN_ID: Range = (-1, LARGEST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """Base: the entries that shape a network are the fields."""

    kind: ClassVar[str]
    ranges: ClassVar[Mapping[str, Range]] = {}
    possible: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for one that is not possible."""
        check_types(self, self.kind, self.ranges)
        for name, values in self.possible.items():
            if getattr(self, name) not in values:
                self.refuse(name, f"possible: {values}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the fields alone, since other entries may name code to run."""
        return {name: value for name, value in super().to_dict().items() if name in self.__dataclass_fields__}

    def refuse(self, name: str, reason: str) -> None:
        """Raise `ValueError` for the entry called `name`."""
        raise ValueError(f"{self.kind} config: {name}={getattr(self, name)!r:.80} is not possible; {reason}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPEntries(EncoderConfig):
    """Base: what shapes either tower of CLIP."""

    ranges: ClassVar[Mapping[str, Range]] = {
        "num_hidden_layers": (1, MOST_LAYERS),
        "layer_norm_eps": (SMALLEST, 1),
        "attention_dropout": (0, 1),
    }
    possible: ClassVar[Mapping[str, tuple[Any, ...]]] = {"hidden_act": ACTIVATIONS}

    hidden_size: int
    intermediate_size: int
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | None = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for one that is not possible."""
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            self.refuse("num_attention_heads", f"hidden_size={self.hidden_size} must be a multiple of it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextEntries(CLIPEntries):
    """Shape of a `CLIPTextModel`."""

    kind: ClassVar[str] = "Text encoder"
    ranges: ClassVar[Mapping[str, Range]] = {
        **CLIPEntries.ranges,
        "max_position_embeddings": (1, 2**16),
        "pad_token_id": TOKEN_ID,
        "bos_token_id": TOKEN_ID,
        "eos_token_id": TOKEN_ID,
    }

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    initializer_factor: float | None = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | tuple[int, ...] | None = 49407
    use_attention_mask: bool | None = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionEntries(CLIPEntries):
    """Shape of a `CLIPVisionModel`."""

    kind: ClassVar[str] = "Vision encoder"
    ranges: ClassVar[Mapping[str, Range]] = {
        **CLIPEntries.ranges,
        "image_size": (1, MOST_PIXELS),
        "patch_size": (1, MOST_PIXELS),
    }

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for one that is not possible."""
        super().__post_init__()
        if self.patch_size > self.image_size:
            self.refuse("patch_size", f"it must be at most image_size={self.image_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyCheckerEntries(EncoderConfig):
    """Shape of the safety checker: a CLIP model's, of which it has the vision tower and the projection."""

    kind: ClassVar[str] = "Safety checker"

    projection_dim: int = 512
    vision_config: CLIPVisionEntries = dataclasses.field(default_factory=CLIPVisionEntries)
    text_config: CLIPTextEntries = dataclasses.field(default_factory=CLIPTextEntries)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Read the entries; the older files say each tower twice, and what `..._config_dict` says prevails."""
        vision = CLIPVisionEntries.from_dict(_tower(source, "vision_config"))
        text = CLIPTextEntries.from_dict(_tower(source, "text_config"))
        return super().from_dict({**source, "vision_config": vision, "text_config": text})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, in which each tower stands once."""
        towers = {"vision_config": self.vision_config.to_dict(), "text_config": self.text_config.to_dict()}
        return {"projection_dim": self.projection_dim, **towers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Entries(EncoderConfig):
    """Shape of a `T5EncoderModel`."""

    kind: ClassVar[str] = "Text encoder"
    ranges: ClassVar[Mapping[str, Range]] = {
        "num_layers": (1, MOST_LAYERS),
        "num_decoder_layers": (0, MOST_LAYERS),
        "relative_attention_num_buckets": (2, 2**16),
        "dropout_rate": (0, 1),
        "layer_norm_epsilon": (SMALLEST, 1),
        "pad_token_id": TOKEN_ID,
        "eos_token_id": TOKEN_ID,
    }
    possible: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "feed_forward_proj": ("relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-silu"),
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    tie_word_embeddings: bool | None = True

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the entry, for one that is not possible."""
        super().__post_init__()
        if self.unused.get("is_gated_act", self.is_gated) is not self.is_gated:
            self.refuse("feed_forward_proj", f"is_gated_act={self.unused['is_gated_act']!r:.80} says another")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            self.refuse("relative_attention_max_distance", "it must be above a quarter of the number of buckets")

    @property
    def is_gated(self) -> bool:
        """Whether a second linear layer multiplies what the nonlinearity makes of the first."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def nonlinearity(self) -> str:
        """The name of the nonlinearity between the linear layers; "gated-gelu" has always meant the one by tanh."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


def _tower(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    said = [source.get(name), source.get(f"{name}_dict")]
    for entry in said:
        if entry is not None and not isinstance(entry, dict):
            raise ValueError(f"Safety checker config: {name}={entry!r:.80} is not possible; it must hold entries.")
    return {**(said[0] or {}), **(said[1] or {})}
