"""The stages of each pipeline as they are traced on meta: one call of each stage, and the tensors alive around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lowtide.activations.frame_cache import batches_gone_through, frame_batches
from lowtide.fitting.meta_subject import nbytes
from lowtide.fitting.subject import TracedStage
from lowtide.models.safety_checker import is_published_checker
from lowtide.planning.run_size import RunSize

HISTORY = 8
"""How many float32 copies of the latents the scheduler, guidance and noise have alive at once, at most."""
GUIDANCE = 7.5
"""Any scale at which guidance is on."""
_FLOAT32 = 4


def picture_stages(pipe: Any, size: RunSize) -> Iterator[TracedStage]:
    """The stages of a Stable Diffusion pipeline whose networks are on meta."""
    text, dtype = pipe.text_encoder.config, pipe.dtype
    ids = torch.empty((size.prompts, text.max_position_embeddings), dtype=torch.long, device="meta")
    yield TracedStage("encode prompt", "text_encoder", 1 + size.guided, lambda: pipe.text_encoder(ids)[0], (ids,))
    x = torch.empty(pipe.latent_shape(size.pictures, size.height, size.width), dtype=dtype, device="meta")
    seen = size.pictures * (1 + size.guided)
    embeds = torch.empty((seen, ids.shape[1], text.hidden_size), dtype=dtype, device="meta")
    timestep = torch.empty((), dtype=torch.long, device="meta")
    scale = GUIDANCE if size.guided else 1.0
    history = HISTORY * x.numel() * _FLOAT32
    yield TracedStage(
        "denoise", "unet", size.steps, lambda: pipe.predict_noise(x, timestep, embeds, scale), (x, embeds), history
    )
    if size.output == "latent":
        return
    values, ways = 3 * size.height * size.width * size.pictures, pipe.ways()["decode"]
    if size.output == "file":
        z = x[:1]
        run = lambda: pipe.vae.decode_rows(z, lambda first, rows: None)  # noqa: E731
        yield TracedStage("decode", "vae", size.pictures, run, (z,), nbytes(x, embeds), ways=ways)
    else:
        tail = values * picture_bytes(size.output, dtype)
        carried = nbytes(embeds)
        yield TracedStage("decode", "vae", 1, lambda: pipe.vae.decode(x), (x,), carried, tail, ways=ways)
    if is_published_checker(pipe.safety_checker):  # what others do cannot be traced
        side = pipe.safety_checker.config.vision_config.image_size
        seen_at_once = 1 if size.output == "file" else size.pictures
        clip = torch.empty((seen_at_once, 3, side, side), dtype=dtype, device="meta")
        carried = 0 if size.output == "file" else values * picture_bytes("pil", dtype)
        calls = size.pictures if size.output == "file" else 1
        look = lambda: pipe.safety_checker.vision_model(clip)  # noqa: E731
        yield TracedStage("safety check", "safety_checker", calls, look, (clip,), carried)


def clip_stages(pipe: Any, size: RunSize) -> Iterator[TracedStage]:
    """The stages of a CogVideoX pipeline whose networks are on meta."""
    frames = size.frames or 1
    config, dtype = pipe.transformer_config, pipe.dtype
    tokens = config.max_text_seq_length
    if pipe.text_encoder is not None:
        ids = torch.empty((size.prompts, tokens), dtype=torch.long, device="meta")
        yield TracedStage("encode prompt", "text_encoder", 1 + size.guided, lambda: pipe.text_encoder(ids)[0], (ids,))
    shape = pipe.latent_shape(size.pictures, frames, size.height, size.width)
    x = torch.empty(shape, dtype=dtype, device="meta")
    seen = size.pictures * (1 + size.guided)
    embeds = torch.empty((seen, tokens, config.text_embed_dim), dtype=dtype, device="meta")
    timestep = torch.empty((), dtype=torch.long, device="meta")
    rotary = pipe.rotary_positions(shape)
    positions = () if rotary is None else rotary
    run = lambda: pipe.predict_noise(x, timestep, embeds, GUIDANCE, rotary)  # noqa: E731
    history = HISTORY * x.numel() * _FLOAT32
    yield TracedStage("denoise", "transformer", size.steps, run, (x, embeds, *positions), history)
    if size.output == "latent":
        return
    latents = shape[1] - pipe.padding(frames)
    z = torch.empty((1, shape[2], latents, *shape[3:]), dtype=dtype, device="meta")
    gone_through = batches_gone_through(z, frame_batches(latents, pipe.vae.num_latent_frames_batch_size))
    parts = latents / sum(batch.stop - batch.start for batch in gone_through)
    values = 3 * size.height * size.width * frames * size.pictures
    carried = nbytes(x, embeds, *positions) + values * clip_bytes(size.output, dtype)
    run = lambda: pipe.vae.decode_frames(z, lambda first, frames: None)  # noqa: E731
    yield TracedStage("decode", "vae", size.pictures, run, (z,), carried, parts=parts, ways=pipe.ways()["decode"])


def clip_bytes(output: str, dtype: torch.dtype) -> int:
    """Bytes for each value of a finished clip, by the output type."""
    return {"pil": 1, "np": _FLOAT32}.get(output, int(dtype.itemsize))


def picture_bytes(output: str, dtype: torch.dtype) -> int:
    """The most bytes alive at once for each value of decoded pictures while they become the output type."""
    in_unit_range = 2 * dtype.itemsize  # the decoder's, and what `to_unit_range` makes of it
    if output == "pt":
        return in_unit_range
    if output == "np":
        return dtype.itemsize + _FLOAT32
    return dtype.itemsize + 3 * _FLOAT32 + 2  # float32, times 255, rounded; then in 8 bits, twice
