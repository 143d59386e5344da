"""What the weights of Stable Diffusion are called in the community's files: tables that follow from configurations.

These are the names of the code that the models were trained with (CompVis, Stability AI, OpenAI and OpenCLIP). In them
the blocks of a U-Net are counted through, where ours are levels with layers in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lowtide.models.encoder_configs import CLIPTextEntries
from lowtide.models.unet_config import CROSS_ATTENTION_BLOCKS, UNet2DConditionConfig
from lowtide.models.vae_config import AutoencoderKLConfig

RESNET_OF_UNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
LAYERS_OF_VAE = {
    "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out",
}  # fmt: skip
LAYER_OF_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
FUSED = ("q", "k", "v")
"""What is one tensor in OpenCLIP, in the order of its rows."""


@dataclass(frozen=True)
class Place:
    """Where a weight is: the tensor called `name`, or of its rows, in `parts` equal ones, the `part`-th from 0."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class OriginalNames:
    """Names of modules here -> there, and of the layers `inside` them; what is in neither is called as it is here."""

    modules: Mapping[str, str]
    inside: Mapping[str, Place]

    def place(self, name: str) -> Place:
        """Where the weight of ours called `name` is."""
        module, rest = _longest(name, self.modules)
        layer, rest = _longest(rest, self.inside)
        begin = [] if module is None else [self.modules[module]]
        place = Place("") if layer is None else self.inside[layer]
        return Place(".".join(filter(None, [*begin, place.name, rest])), place.part, place.parts)


def unet_names(config: UNet2DConditionConfig) -> OriginalNames:
    """Those of a U-Net: `input_blocks`, `middle_block` and `output_blocks`, each with its layers in order."""
    modules = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    levels, layers = range(len(config.block_out_channels)), config.layers_per_block
    for level in levels:
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"{block}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"{block}.1"
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
    for level in levels:
        attends = config.up_block_types[level] in CROSS_ATTENTION_BLOCKS
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"{block}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"{block}.1"
        last = f"output_blocks.{level * (layers + 1) + layers}.{2 if attends else 1}"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{last}.conv"
    return OriginalNames(modules, _whole(RESNET_OF_UNET))


def vae_names(config: AutoencoderKLConfig) -> OriginalNames:
    """Those of an autoencoder, whose decoder counts its levels from the finest one."""
    levels = len(config.block_out_channels)
    modules: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        modules[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        modules |= {f"{side}.mid_block.resnets.{layer}": f"{side}.mid.block_{layer + 1}" for layer in range(2)}
    for level in range(levels):
        for ours, theirs in (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
            (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"),
        ):
            layers = range(config.layers_per_block + 1)
            modules |= {f"{ours}.resnets.{layer}": f"{theirs}.block.{layer}" for layer in layers}
            modules[f"{ours}.downsamplers.0"] = f"{theirs}.downsample"
            modules[f"{ours}.upsamplers.0"] = f"{theirs}.upsample"
    return OriginalNames(modules, _whole(LAYERS_OF_VAE))


def open_clip_names(config: CLIPTextEntries) -> OriginalNames:
    """Those of OpenCLIP's text encoder, in which queries, keys and values are made by one product."""
    modules = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        **{f"encoder.layers.{layer}": f"transformer.resblocks.{layer}" for layer in range(config.num_hidden_layers)},
    }
    return OriginalNames(modules, {**_whole(LAYER_OF_OPEN_CLIP), **dict(_fused())})


CLIP_NAMES = OriginalNames({}, {})
"""Those of OpenAI's text encoder: they are ours."""


def _whole(table: Mapping[str, str]) -> dict[str, Place]:
    return {ours: Place(theirs) for ours, theirs in table.items()}


def _fused() -> Iterator[tuple[str, Place]]:
    for number, letter in enumerate(FUSED):
        for kind in ("weight", "bias"):
            yield f"self_attn.{letter}_proj.{kind}", Place(f"attn.in_proj_{kind}", number, len(FUSED))


def _longest(name: str, table: Mapping[str, object]) -> tuple[str | None, str]:
    """The longest beginning of a name, of whole words, that a table has, and what comes behind it."""
    words = name.split(".")
    for count in range(len(words), 0, -1):
        begin = ".".join(words[:count])
        if begin in table:
            return begin, ".".join(words[count:])
    return None, name
