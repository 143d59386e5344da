"""Pipelines of diffusers under the names of the files that models were first published in: its conversions, undone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

State = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm": "ln_final", "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", ".self_attn": ".attn",
}  # fmt: skip
SD3 = {
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
}  # fmt: skip
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k", "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
FLUX2 = {
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin", "proj_out": "final_layer.linear",
}  # fmt: skip
FLUX2_BLOCK = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj", "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale", "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
}  # fmt: skip
FLUX_BLOCK = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    **{name: old for name, old in FLUX2_BLOCK.items() if "attn" in name},
}  # fmt: skip
SINGLE_BLOCK = {
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2", "norm.linear": "modulation.lin", "proj_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale",
}  # fmt: skip


def stable_diffusion(pipe: Any) -> State:
    """The file of a whole Stable Diffusion 1."""
    encoder = clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return {**unet(pipe.unet), **autoencoder(pipe.vae, "first_stage_model."), **encoder}


def sdxl(pipe: Any) -> State:
    """The file of a whole SDXL."""
    first = clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    second = open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {**unet(pipe.unet), **autoencoder(pipe.vae, "first_stage_model."), **first, **second}


def stable_diffusion_3(pipe: Any) -> State:
    """The file of a whole Stable Diffusion 3, its text encoders among it."""
    encoders = (
        clip(pipe.text_encoder, "text_encoders.clip_l.transformer."),
        clip(pipe.text_encoder_2, "text_encoders.clip_g.transformer."),
        named(pipe.text_encoder_3.state_dict(), "text_encoders.t5xxl.transformer."),
    )
    denoiser = named(sd3_transformer(pipe.transformer), "model.diffusion_model.")
    return {
        **denoiser,
        **autoencoder(pipe.vae, "first_stage_model."),
        **{k: v for part in encoders for k, v in part.items()},
    }


def named(state: State, prefix: str) -> State:
    """Weights with something before their names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def replaced(name: str, table: dict[str, str]) -> str:
    """A name with the one entry of a table that it begins with in place of its own beginning."""
    for new, old in table.items():
        if name == new or name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    raise KeyError(name)


def unet(network: Any) -> State:
    """A U-Net under the names of latent diffusion."""
    layers = network.config.layers_per_block + 1
    return named({_of_unet(name, layers, network): tensor for name, tensor in network.state_dict().items()},
        "model.diffusion_model.")  # fmt: skip


def _of_unet(name: str, layers: int, network: Any) -> str:
    if not (match := re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)):
        return replaced(name, UNET)
    side, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    inner = replaced(rest, RESNET) if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{inner}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        has_attention = getattr(network.up_blocks[block], "attentions", None) is not None
        return f"output_blocks.{block * layers + layers - 1}.{2 if has_attention else 1}.{rest}"
    place = 1 + block * layers + number if side == "down" else block * layers + number
    return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{0 if kind == 'resnets' else 1}.{inner}"


def autoencoder(network: Any, prefix: str) -> State:
    """An autoencoder of pictures under the names of latent diffusion, whose attention projects by convolutions."""
    levels = len(network.config.block_out_channels)
    state: State = {}
    for name, tensor in network.state_dict().items():
        is_linear = "attentions" in name and tensor.ndim == 2
        state[prefix + _of_autoencoder(name, levels)] = tensor[:, :, None, None] if is_linear else tensor
    return state


def _of_autoencoder(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda match: f"up.{levels - 1 - int(match[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", name)


def clip(network: Any, prefix: str) -> State:
    """CLIP's text encoder as it was before version 5 of transformers."""
    return named({_wrapped(name): tensor for name, tensor in network.state_dict().items()}, prefix)


def _wrapped(name: str) -> str:
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def open_clip(network: Any, prefix: str) -> State:
    """CLIP's text encoder under the names of OpenCLIP: projections in one, and the last one turned."""
    state: State = {}
    own = {_wrapped(name): tensor for name, tensor in network.state_dict().items()}
    for name, tensor in own.items():
        old = name
        for new, other in OPEN_CLIP.items():
            old = old.replace(new, other)
        if name == "text_projection.weight":
            state["text_projection"] = tensor.T.contiguous()
        elif ".q_proj." in old:
            kind = old.rpartition(".")[2]
            state[old.replace(f".q_proj.{kind}", f".in_proj_{kind}")] = torch.cat(
                [own[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            )
        elif ".k_proj." not in old and ".v_proj." not in old:
            state[old] = tensor
    return named(state, prefix)


def _fused(state: State, parts: Iterable[str]) -> torch.Tensor:
    return torch.cat([state[part] for part in parts])


def _swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Scale and shift in the other order."""
    return torch.cat(tensor.chunk(2)[::-1])


def sd3_transformer(network: Any) -> State:
    """The denoiser of Stable Diffusion 3."""
    own, state, last = network.state_dict(), {}, network.config.num_layers - 1
    for name, tensor in own.items():
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
        if match is None:
            if name.startswith("norm_out.linear"):
                state[name.replace("norm_out.linear", "final_layer.adaLN_modulation.1")] = _swapped(tensor)
            else:
                state[name if name.startswith("context_embedder") else replaced(name, SD3)] = tensor
            continue
        block, inner = f"joint_blocks.{match[1]}", match[2]
        fused = _first_of_three(name, inner, own)
        if fused is not None:
            stream = "context_block" if "add_" in inner else "x_block"
            attention, kind = inner.split(".")[0], inner.rpartition(".")[2]
            state[f"{block}.{stream}.{attention}.qkv.{kind}"] = fused
        elif not re.search(r"to_[qkv]|add_[qkv]", inner):
            is_last = int(match[1]) == last and inner.startswith("norm1_context")
            state[f"{block}.{replaced(inner, SD3_BLOCK)}"] = _swapped(tensor) if is_last else tensor
    return state


def _first_of_three(name: str, inner: str, own: State) -> torch.Tensor | None:
    """What is fused with the projection of queries that a name is of; None for other weights."""
    if "to_q." in inner:
        return _fused(own, [name.replace("to_q", part) for part in ("to_q", "to_k", "to_v")])
    if "add_q_proj" in inner:
        return _fused(own, [name.replace("add_q", part) for part in ("add_q", "add_k", "add_v")])
    return None


def flux2_transformer(network: Any) -> State:
    """The denoiser of FLUX.2."""
    return _of_flux(network, FLUX2, FLUX2_BLOCK)


def flux_transformer(network: Any) -> State:
    """The denoiser of FLUX.1."""
    state = _of_flux(network, FLUX, FLUX_BLOCK)
    own = network.state_dict()
    for number in range(network.config.num_single_layers):
        for kind in ("weight", "bias"):
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            names = [f"single_transformer_blocks.{number}.{part}.{kind}" for part in parts]
            state[f"single_blocks.{number}.linear1.{kind}"] = _fused(own, names)
    return state


def _of_flux(network: Any, table: dict[str, str], blocks: dict[str, str]) -> State:
    own, state = network.state_dict(), {}
    for name, tensor in own.items():
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", name)
        if match is None:
            is_norm = name.startswith("norm_out.linear")
            old = (
                name.replace("norm_out.linear", "final_layer.adaLN_modulation.1") if is_norm else replaced(name, table)
            )
            state[old] = _swapped(tensor) if is_norm else tensor
        elif match[1]:
            if not re.search(r"attn\.to_[qkv]\.|proj_mlp", name):
                state[f"single_blocks.{match[2]}.{replaced(match[3], SINGLE_BLOCK)}"] = tensor
        elif (fused := _first_of_three(name, match[3], own)) is not None:
            stream, kind = "txt" if "add_" in name else "img", name.rpartition(".")[2]
            state[f"double_blocks.{match[2]}.{stream}_attn.qkv.{kind}"] = fused
        elif not re.search(r"to_[kv]\.|add_[kv]_", name):
            state[f"double_blocks.{match[2]}.{replaced(match[3], blocks)}"] = tensor
    return state
