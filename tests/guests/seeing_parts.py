"""Text encoders that see pictures, as newer guests have them: their tokenizer, networks and a processor."""

from __future__ import annotations

from typing import Any

from tests.guests import guest_parts as parts
from tests.guests import guest_tokenizers as tokenizers
from tests.guests.family import ready

MARKS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>"}  # fmt: skip
TEXT = {
    "hidden_size": parts.WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
TURNS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6}}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": parts.WIDTH}  # fmt: skip


def words_and_pictures() -> Any:
    """Qwen's tokenizer with marks for pictures."""
    words = tokenizers.qwen()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *MARKS.values()]})
    return words


def qwen3_vl(words: Any, **changes: Any) -> Any:
    """Qwen 3 of text and pictures."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**TEXT, **TURNS, "vocab_size": len(words), "head_dim": 12, "pad_token_id": words.pad_token_id, **changes}
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return ready(Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(words))))


def qwen2_5_vl(words: Any) -> Any:
    """Qwen 2.5 of text and pictures."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**TEXT, **TURNS, "vocab_size": len(words), "bos_token_id": words.pad_token_id}
    vision = {**VISION, "fullatt_block_indexes": [1], "window_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_ids(words))
    return ready(Qwen2_5_VLForConditionalGeneration(config))


def mistral3(words: Any) -> Any:
    """Mistral 3 of text and pictures."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**{**TEXT, "vocab_size": len(words), "head_dim": 12, "num_hidden_layers": 4})
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    vision = PixtralVisionConfig(hidden_size=16, intermediate_size=32, image_size=16, patch_size=4, **heads)
    return ready(Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)))


def siglip() -> dict[str, Any]:
    """SigLIP's encoder of pictures of 32x32 pixels, and what makes pictures ready for it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = SiglipVisionConfig(hidden_size=parts.WIDTH, intermediate_size=48, **shape)
    return {
        "image_encoder": ready(SiglipVisionModel(config)),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }


class Processor:
    """A stand-in for Qwen's processor, whose own class wants torchvision: pictures first, words by its tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> Any:
        if images is not None or videos is not None:
            raise ValueError(f"Incorrect image source: {images!r:.80}")
        return self.tokenizer(text, **options)

    def decode(self, *places: Any, **options: Any) -> Any:
        return self.tokenizer.decode(*places, **options)


def _ids(words: Any) -> dict[str, int]:
    return {f"{name}_id": words.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
