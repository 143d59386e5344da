"""Tiny Stable Diffusion 1 and 2 in one file under their original names, and files of published sizes without numbers.

The names are made by `tests.guests.original_names`, which undoes the conversions of diffusers and knows none of ours.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests import tiny
from tests.guests import original_names

from lowtide.models.clip_text import CLIPTextModel
from lowtide.weights.index import CheckpointIndex, TensorEntry

KINDS = ("sd1", "sd2")
UNETS = {
    "sd1": tiny.FEW_BLOCKS,
    "sd2": {**tiny.FEW_BLOCKS, "attention_head_dim": [1, 2]},
}
STRAY = {
    "model_ema.decay": (),
    "model_ema.diffusion_modelinput_blocks00weight": (8, 4, 3, 3),
    "alphas_cumprod": (1000,),
    "sqrt_one_minus_alphas_cumprod": (1000,),
    "posterior_variance": (1000,),
    "betas": (1000,),
    "denoiser.sigmas": (1000,),
    "first_stage_model.loss.logvar": (),
    "embedding_manager.string_to_param_dict.x": (1, 8),
    "cond_stage_model.logit_scale": (),
}


@dataclass(frozen=True)
class Written:
    """A pipeline in a folder, and the same numbers in a file."""

    folder: Path
    file: Path


def pipeline(kind: str, folder: Path) -> Any:
    """A pipeline of a kind; `folder` keeps its vocabulary."""
    pipe = tiny.pipeline(folder, unet=tiny.unet(kind, **UNETS[kind]))
    if kind == "sd2":
        config = {**pipe.text_encoder.config.to_dict(), "hidden_act": "gelu"}
        pipe.text_encoder = tiny.set_weights(CLIPTextModel.from_config(config))
    return pipe


def original_state(kind: str, pipe: Any) -> dict[str, torch.Tensor]:
    """Its weights by original names, with what such files hold beside them."""
    if kind == "sd1":
        state = original_names.stable_diffusion(pipe)
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(tiny.MAX_TOKENS)[None]
    else:
        encoder = original_names.open_clip(pipe.text_encoder, "cond_stage_model.model.")
        last = pipe.text_encoder.config.num_hidden_layers
        begin = f"cond_stage_model.model.transformer.resblocks.{last - 1}."
        unused = {
            name.replace(begin, begin.replace(f".{last - 1}.", f".{last}.")): tensor
            for name, tensor in encoder.items()
            if name.startswith(begin)
        }
        width = pipe.text_encoder.config.hidden_size
        beside = {"text_projection": torch.ones(width, width), "logit_scale": torch.ones(())}
        beside = {f"cond_stage_model.model.{name}": tensor for name, tensor in beside.items()}
        parts = (original_names.unet(pipe.unet), original_names.autoencoder(pipe.vae, "first_stage_model."))
        state = {**parts[0], **parts[1], **encoder, **unused, **beside}
    return {**state, **{name: torch.full(shape, float("nan")) for name, shape in STRAY.items()}}


def write(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Written:
    """A pipeline in a folder and in a file, its weights in a dtype."""
    pipe = pipeline(kind, folder / "words").to(dtype)
    pipe.save_pretrained(folder / "model")
    file = save(original_state(kind, pipe), folder / "model.safetensors")
    return Written(folder / "model", file)


def save(state: dict[str, torch.Tensor], file: Path, **metadata: str) -> Path:
    """A file of weights."""
    save_file({name: x.contiguous().clone() for name, x in state.items()}, file, metadata=metadata or None)
    return file


def index_of(shapes: dict[str, tuple[int, ...]], **metadata: str) -> CheckpointIndex:
    """An index of a file that is not there."""
    file = Path("model.safetensors")
    entries = {name: TensorEntry(file, 0, 0, torch.float16, shape) for name, shape in shapes.items()}
    return CheckpointIndex(entries, (file,), metadata)


def write_sparse(shapes: dict[str, tuple[int, ...]], file: Path) -> Path:
    """A file of weights in half precision that takes no room: a header, and a hole where the numbers would be."""
    header, place = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + nbytes]}
        place += nbytes
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + place)
    return file


@functools.cache
def published_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """The original names and shapes of Stable Diffusion 1.5 or 2.1."""
    from importlib import resources

    from lowtide.models.unet import UNet2DConditionModel
    from lowtide.models.vae import AutoencoderKL

    name = {"sd1": "stable_diffusion_1", "sd2": "stable_diffusion_2"}[kind]
    folder = Path(str(resources.files("lowtide"))) / "assets" / "published_configs" / name
    parts = {}
    for part, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        parts[part] = cls.on_meta(folder / part, cls.read_config(folder / part), None)
    state = {
        **original_names.unet(parts["unet"]),
        **original_names.autoencoder(parts["vae"], "first_stage_model."),
        **(
            original_names.clip(parts["text_encoder"], "cond_stage_model.transformer.")
            if kind == "sd1"
            else original_names.open_clip(parts["text_encoder"], "cond_stage_model.model.")
        ),
    }
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
