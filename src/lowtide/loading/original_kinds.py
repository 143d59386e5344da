"""What a file of weights holds, told by names and shapes: nothing but its header is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import translate

from lowtide.weights.gguf import KINDS, GgufIndex
from lowtide.weights.index import CheckpointError, CheckpointIndex

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
_CONTEXT = re.compile(r"model\.diffusion_model\..*\.attn2\.to_k\.weight$")
PIECES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("a LoRA", ("lora_unet_*", "lora_te*", "*.lora_down.weight", "*.lora_A.weight", "*.lora.down.weight",
     "*.hada_w1_a"), "It changes a model: give that as the model. --lora adds it to a model of diffusers' pipelines."),
    ("a ControlNet", ("control_model.*", "controlnet_cond_embedding.*", "input_hint_block.*"),
     "It steers a model: load it with diffusers and give it to a pipeline of its, lowtide.load(..., controlnet=...)."),
    ("a textual inversion", ("emb_params", "string_to_param*", "<*>"), "It is one word, and no model."),
)  # fmt: skip
"""What no pipeline can be made of: what it is, patterns of its names, and what to do with it."""
_WHOLE = "Give the file of the whole model, or the folder or Hub id of the pipeline that it is a part of."
NETWORKS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("a VAE alone", ("first_stage_model.*", "vae.*", "encoder.*", "decoder.*", "*quant_conv.*", "loss.*",
     "model_ema.*"), "Give it beside a model: vae=FILE (--vae FILE)."),
    ("a U-Net alone", ("input_blocks.*", "middle_block.*", "output_blocks.*", "out.*", "time_embed.*", "label_emb.*"),
     _WHOLE),
    ("a U-Net alone", ("down_blocks.*", "mid_block.*", "up_blocks.*", "conv_*", "time_embedding.*", "add_embedding.*"),
     _WHOLE),
    ("a text encoder alone", ("text_model.*", "cond_stage_model.*", "text_projection*", "logit_scale", "ln_final.*",
     "transformer.resblocks.*", "token_embedding.*", "positional_embedding", "visual.*"), _WHOLE),
)  # fmt: skip
"""Networks without the others: what it is, patterns of all its names, and what to do with it."""
OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("an SDXL model", ("conditioner.embedders.1.*",)),
    ("an SDXL refiner", ("conditioner.embedders.0.model.*",)),
    ("a Stable Diffusion 3 model", ("*joint_blocks.0.context_block.*",)),
    ("a FLUX.2 model", ("*single_stream_modulation.lin.weight",)),
    ("a FLUX model", ("*double_blocks.0.img_attn.*",)),
    ("a Wan model", ("*head.modulation",)),
    ("an LTX model", ("*patchify_proj.weight",)),
)
"""Models that only pipelines of diffusers run, by patterns of names."""
BESIDE = {
    9: ("an inpainting model", "it reads a mask and a masked picture beside the latents"),
    8: ("a model that edits pictures (InstructPix2Pix)", "it reads a picture beside the latents"),
    5: ("a depth-to-picture model", "it reads a map of depths beside the latents"),
    7: ("an upscaling model", "it reads a small picture beside the latents"),
}
"""What a U-Net of so many channels is for."""
GENERATIONS = {768: "stable_diffusion_1", 1024: "stable_diffusion_2"}
"""The folder of published configurations, by the width of the text encoder's states."""
EPSILON = {"stable_diffusion_2": "stable_diffusion_2_base"}
"""The folder of those models that were trained to predict noise where the usual ones predict velocity."""


@dataclass(frozen=True)
class OriginalKind:
    """What a file holds, in words.

    `is_ours` where a pipeline of ours makes pictures with it; `configs` is the folder of configurations that were
    published for such a model, None where its sizes are of no model that was published; `predicts` is what the file
    says that it predicts, None where it says nothing.
    """

    name: str
    is_ours: bool = False
    configs: str | None = None
    predicts: str | None = None


def kind_of(index: CheckpointIndex, prediction_type: str | None = None) -> OriginalKind:
    """What a file holds.

    What a model predicts no shape tells: it is `prediction_type`, or what the file's metadata say, or what the best
    known model of such shapes does. Raises `CheckpointError`, which says what to do, for what is no whole model.
    """
    other = next((name for name, patterns in OTHERS if _has(index, patterns)), None)
    _check_whole(index, known=other is not None)
    if CONV_IN not in index:
        return OriginalKind(other or "a model that Lowtide does not know")
    if other is not None or _has(index, ("model.diffusion_model.label_emb.*",)):
        return OriginalKind(other or "an SDXL model")
    configs = GENERATIONS.get(_context_width(index))
    is_second = configs == GENERATIONS[1024] or _has(index, ("cond_stage_model.model.*",))
    name = f"Stable Diffusion {'2' if is_second else '1'}.x model"
    channels = index[CONV_IN].shape[1] if len(index[CONV_IN].shape) > 1 else 0
    if channels in BESIDE:
        return OriginalKind(f"{BESIDE[channels][0]} ({name}): {BESIDE[channels][1]}")
    predicts = _predicts(index)
    if configs is not None and (prediction_type or predicts) == "epsilon":
        configs = EPSILON.get(configs, configs)
    return OriginalKind(f"a {name}", is_ours=True, configs=configs, predicts=predicts)


def _check_whole(index: CheckpointIndex, *, known: bool) -> None:
    """Raise `CheckpointError` for what is no model, and for one of its networks, unless it is `known` otherwise."""
    for name, patterns, advice in PIECES:
        if _has(index, patterns):
            raise CheckpointError(f"{index.files[0]} is {name}, and no model. {advice}")
    for name, patterns, advice in () if known else NETWORKS:
        if _has_only(index, patterns):
            raise CheckpointError(f"{index.files[0]} is {name}, and no whole model. {advice}")


def _predicts(index: CheckpointIndex) -> str | None:
    """What a model predicts by its file's metadata, as training scripts write them, or a mark among its weights."""
    said = index.metadata.get("modelspec.prediction_type", "v" if "v_pred" in index else "")
    return {"epsilon": "epsilon", "v": "v_prediction"}.get(said)


def _context_width(index: CheckpointIndex) -> int:
    """How wide the states of the text encoder are that a U-Net reads."""
    name = next((name for name in index if _CONTEXT.match(name)), None)
    if name is None:
        return 0
    width = index[name].shape[-1]
    if not isinstance(index, GgufIndex) or name not in index.kinds:
        return width
    kind = KINDS[index.kinds[name]]
    return width * index[name].dtype.itemsize // kind.nbytes * kind.numbers


def _has(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(map(_matching(patterns).match, names))


def _has_only(names: Collection[str], patterns: Iterable[str]) -> bool:
    return len(names) > 0 and all(map(_matching(patterns).match, names))


def _matching(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
