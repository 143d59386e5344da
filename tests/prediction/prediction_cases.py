"""Calls whose memory is predicted and measured: modules, inputs, ways and plans."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tests import tiny_video
from tests.memory_peaks import peak_bytes
from torch.utils._pytree import tree_map_only
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import lowtide
from lowtide.configs import read_json
from lowtide.memory.attach import detach
from lowtide.memory.presets import apply_residency
from lowtide.models import clip_text, t5
from lowtide.models.unet import UNet2DConditionModel
from lowtide.models.vae import AutoencoderKL
from lowtide.models.video_positions import rotary_embedding
from lowtide.models.video_transformer import CogVideoXTransformer3DModel
from lowtide.models.video_vae import AutoencoderKLCogVideoX
from lowtide.planning.workload import Call
from lowtide.prediction.component import trace_call
from lowtide.prediction.multiplier import Multiplier

SEASCAPES = Path(lowtide.__file__).parent / "assets" / "seascapes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """`make` builds the module, `inputs` the tensors of `call(module, *inputs)`; `prepare` chooses the way."""

    name: str
    make: Callable[[], torch.nn.Module]
    call: Callable[..., Any]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    dtype: str = "float32"
    prepare: Callable[[Any], None] = lambda module: None
    level: str | None = None
    """Whether weights come from a file of their own dtype, by blocks or leaves; else they are resident."""

    def __str__(self):
        return f"{self.name}-{self.dtype}" + (f"-{self.level}" if self.level else "")

    def module(self, device):
        with torch.device("meta"):
            module = self.make().to(DTYPES[self.dtype]).eval().requires_grad_(False)
        if device == "cpu":
            module._apply(lambda weight: torch.zeros_like(weight, device="cpu"))
        self.prepare(module)
        return module

    def tensors(self):
        dtype = DTYPES[self.dtype]
        return tree_map_only(
            torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() and one.ndim > 1 else one, self.inputs()
        )

    def predicted(self) -> Call:
        module = self.module("meta")
        inputs = tree_map_only(torch.Tensor, lambda one: torch.empty_like(one, device="meta"), self.tensors())
        return trace_call(lambda: self.call(module, *inputs), [module], inputs)

    def measured(self):
        """The peak of a second call: what a module makes once and keeps is there."""
        module, inputs = self.module("cpu"), self.tensors()
        if self.level:
            apply_residency(module, 0, rest="disk", level=self.level, device="cpu")
        with torch.no_grad():
            self.call(module, *inputs)
            peak = peak_bytes(lambda: self.call(module, *inputs))
        detach(module)
        return peak + sum(one.untyped_storage().nbytes() for one in inputs)


def seascapes(part, kind):
    config = read_json(SEASCAPES / part / "config.json")
    return lambda: kind.from_config(config)


def zeros(*shapes):
    return lambda: tuple(torch.zeros(shape) for shape in shapes)


def unet_inputs(batch, side, tokens=77, width=160):
    return lambda: (torch.zeros(batch, 4, side, side), torch.full((batch,), 5), torch.zeros(batch, tokens, width))


def transformer_inputs(config, batch, frames, rows, columns):
    model = config
    text = model["max_text_seq_length"]
    return lambda: (
        torch.zeros(batch, frames, model["in_channels"], rows, columns),
        torch.zeros(batch, text, model["text_embed_dim"]),
        torch.full((batch,), 5),
    )


def call_unet(unet, x, time, text):
    return unet(x, time, text)


def decode(vae, z):
    return vae.decode(z)


def encode(vae, x):
    return vae.encode(x)


def call_transformer(model, latents, text, time):
    rotary = None
    if model.config.use_rotary_positional_embeddings:
        rotary = rotary_embedding(model.config, *latents.shape[3:], latents.shape[1], latents.device)
    return model(latents, text, time, image_rotary_emb=rotary)


def call_encoder(model, ids):
    return model(ids)


def tokens(batch, count):
    return lambda: (torch.zeros(batch, count, dtype=torch.long),)


def exact(rows, work=None):
    return lambda vae: vae.enable_tiling("exact", rows=rows, work=work)


def blended(size):
    return lambda vae: vae.enable_tiling("blended", tile_size=size)


def in_slices(vae):
    vae.enable_slicing()


UNET = seascapes("unet", UNet2DConditionModel)
VAE = seascapes("vae", AutoencoderKL)
CLIP = CLIPTextConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    bos_token_id=0,
    eos_token_id=2,
)
T5 = T5Config(
    vocab_size=1000, d_model=256, d_kv=64, d_ff=512, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
)
WIDE_VAE = {**tiny_video.VAE, "block_out_channels": [64, 128, 128, 256], "norm_num_groups": 32}
NARROWER_VAE = {**tiny_video.VAE, "block_out_channels": [16, 32, 32, 64], "norm_num_groups": 8}


def video_vae(config):
    return lambda: AutoencoderKLCogVideoX.from_config(config)


def flux():
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        axes_dims_rope=(16, 24, 24),
    )


def call_flux(model, x, text, pooled, time, image_ids, text_ids):
    return model(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time,
        img_ids=image_ids,
        txt_ids=text_ids,
    )


def sd3():
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=256,
        caption_projection_dim=384,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=32,
    )


def call_sd3(model, x, text, pooled, time):
    return model(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time)


def wan():
    import diffusers

    return diffusers.WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=256,
        ffn_dim=1024,
        num_layers=2,
    )


def call_wan(model, x, time, text):
    return model(hidden_states=x, timestep=time, encoder_hidden_states=text)


def transformers():
    for kind in ("5b", "2b"):
        config = tiny_video.TRANSFORMERS[kind]
        wide = {**config, "num_attention_heads": 4, "attention_head_dim": 64}
        for name, one, sizes in ((kind, config, (2, 3, 8, 12)), (f"wide {kind}", wide, (1, 3, 16, 24))):
            yield Case(
                f"CogVideoX {name} transformer",
                lambda one=one: CogVideoXTransformer3DModel.from_config(one),
                call_transformer,
                transformer_inputs(one, *sizes),
            )
    ids = zeros((1, 256, 64), (1, 64, 256), (1, 128), (1,), (256, 3), (64, 3))
    yield Case("Flux", flux, call_flux, ids)
    yield Case("SD 3", sd3, call_sd3, zeros((2, 16, 32, 32), (2, 77, 256), (2, 128), (2,)))
    yield Case(
        "Wan", wan, call_wan, lambda: (torch.zeros(1, 16, 3, 16, 16), torch.tensor([5]), torch.zeros(1, 64, 256))
    )
    yield Case("CLIP", lambda: clip_text.CLIPTextModel.from_config(CLIP.to_dict()), call_encoder, tokens(2, 77))
    yield Case("T5", lambda: t5.T5EncoderModel.from_config(T5.to_dict()), call_encoder, tokens(1, 100))
    yield Case("CLIP of transformers", lambda: CLIPTextModel(CLIP), call_encoder, tokens(2, 77))
    yield Case("T5 of transformers", lambda: T5EncoderModel(T5), call_encoder, tokens(1, 100))


def autoencoders(less=1):
    """`less` divides the sides of pictures and of tiles; clips have a third of theirs then, and fewer channels.

    Bands have less work then, so that there are as many.
    """
    work = 2**19 if less > 1 else None
    latents = {"16": (1, 4, 16, 16), "32": (1, 4, 32, 32), "2 of 16": (2, 4, 16, 16), "16x24": (1, 4, 16, 24)}
    z = {name: zeros((*shape[:2], *(side // less for side in shape[2:]))) for name, shape in latents.items()}
    for name, shape in z.items():
        yield Case(f"seascapes decode {name}", VAE, decode, shape)
    yield Case("seascapes encode 128", VAE, encode, zeros((1, 3, 128 // less, 128 // less)))
    yield Case("seascapes decode 2 of 16 sliced", VAE, decode, z["2 of 16"], prepare=in_slices)
    yield Case("seascapes decode 32 blended", VAE, decode, z["32"], prepare=blended(128 // less))
    for rows in ("device", "disk"):
        yield Case(f"seascapes decode 16 exact on {rows}", VAE, decode, z["16"], prepare=exact(rows, work))
        yield Case(f"seascapes decode 32 exact on {rows}", VAE, decode, z["32"], prepare=exact(rows, work))
    wide, fewer = (NARROWER_VAE, 3) if less > 1 else (WIDE_VAE, 1)
    for name, config, (frames, *sides) in (
        ("tiny", tiny_video.VAE, (3, 4, 6)),
        ("tiny batches", tiny_video.VAE, (5, 8, 12)),
        ("tiny four batches", tiny_video.VAE, (9, 8, 12)),
        ("wide", wide, (3, 6, 8)),
    ):
        shape = (1, 4, frames, *(max(2, side // fewer) for side in sides))
        yield Case(f"CogVideoX decode {name}", video_vae(config), decode, zeros(shape))
    for name, frames in (("", 3), (" four batches", 9)):
        clip = zeros((1, 4, frames, 6 // fewer, 8 // fewer))
        yield Case(f"CogVideoX decode exact{name}", video_vae(wide), decode, clip, prepare=exact("device", work))


def unets(less=1):
    for batch, side in ((1, 16), (2, 16), (1, 32), (2, 32)):
        yield Case(f"seascapes U-Net {batch} of {side}", UNET, call_unet, unet_inputs(batch, side // less))


def quick_cases():
    """Those of the default run; of smaller maps where half precision takes sixty times as long."""
    is_slow = Multiplier.of(torch.bfloat16) is Multiplier.LOOPS
    in_half = (*unets(2), *autoencoders(4)) if is_slow else (*unets(), *autoencoders())
    for dtype, maps in (("float32", (*unets(), *autoencoders())), ("bfloat16", in_half)):
        for case in (*maps, *transformers()):
            yield replace(case, dtype=dtype)
            is_streamed = case.name in ("seascapes U-Net 2 of 16", "seascapes decode 16", "Flux", "Wan")
            for level in ("block", "leaf") if is_streamed else ():
                yield replace(case, dtype=dtype, level=level)


def half_cases():
    """U-Nets and autoencoders in half precision, at the sizes that they have in float32."""
    for case in (*unets(), *autoencoders()):
        yield replace(case, dtype="bfloat16")
        if case.name in ("seascapes U-Net 2 of 16", "seascapes decode 16"):
            yield from (replace(case, dtype="bfloat16", level=level) for level in ("block", "leaf"))


SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD15_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}


def large_cases():
    """At the shapes of Stable Diffusion 1.5."""
    unet, vae = (
        (lambda: UNet2DConditionModel.from_config(SD15_UNET)),
        (lambda: AutoencoderKL.from_config(SD15_VAE)),
    )
    for dtype in DTYPES:
        for batch, side in ((1, 16), (2, 32), (2, 64)):
            name = f"SD 1.5 U-Net {batch} of {side}"
            yield Case(name, unet, call_unet, unet_inputs(batch, side, width=768), dtype)
        for name, side, prepare in (
            ("32", 32, lambda module: None),
            ("64", 64, lambda module: None),
            ("64 exact on device", 64, exact("device")),
            ("64 exact on disk", 64, exact("disk")),
            ("64 blended", 64, blended(256)),
        ):
            yield Case(f"SD 1.5 decode {name}", vae, decode, zeros((1, 4, side, side)), dtype, prepare)
