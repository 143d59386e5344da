"""How the activations of published denoisers grow with the tokens of a picture or clip: predicted, beside measured.

    python benchmarks/slopes.py [--out benchmarks/results/slopes.md]

Each denoiser is built on meta in bfloat16 with the published configuration, which is what its class in diffusers has by
default, and one forward pass of a batch of one is traced for a GPU at three numbers of tokens. Nothing is computed and
no GPU is needed. The published slopes are those of diffusers-mm 0.4.0, measured on an RTX 5090.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from compare import machine_in_words
from lowtide.prediction.absent_numbers import absent_numbers
from lowtide.prediction.component import trace_call

TOKENS = (4096, 8192, 16384)
GIB = 2**30
BFLOAT16 = torch.bfloat16


def _empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Denoiser:
    """A class of diffusers, what its configuration has besides the defaults, the inputs of a call, and a known slope.

    `inputs` gives a call's arguments for a number of tokens of the picture; `published` is in GiB for 1,000 tokens.
    """

    class_name: str
    published: float
    inputs: Callable[[int], dict[str, Any]]
    config: dict[str, Any]


def krea2(tokens: int) -> dict[str, Any]:
    """One stream of text and picture."""
    return {
        "hidden_states": _empty(1, tokens, 64),
        "encoder_hidden_states": _empty(1, 512, 12, 2560),
        "timestep": _empty(1),
        "position_ids": _empty(512 + tokens, 3, dtype=torch.float32),
        "encoder_attention_mask": _empty(1, 512, dtype=torch.bool),
    }


def ideogram4(tokens: int) -> dict[str, Any]:
    """One stream, in which each token has the states of 13 layers of the text encoder, zero where it is a picture's."""
    length = 512 + tokens
    return {
        "hidden_states": _empty(1, length, 128),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, length, 53248),
        "position_ids": _empty(1, length, 3, dtype=torch.int64),
        "segment_ids": _empty(1, length, dtype=torch.int64),
        "indicator": _empty(1, length, dtype=torch.int64),
    }


def minimax_h3(tokens: int) -> dict[str, Any]:
    """One stream of text, frames and sound."""
    length = 512 + tokens + 128
    places = torch.arange(length)
    return {
        "hidden_states": _empty(1, tokens, 24 * 4),
        "audio_hidden_states": _empty(1, 128, 32),
        "encoder_hidden_states": _empty(1, 512, 5120),
        "timestep": _empty(2),
        "timestep_indices": _empty(length, dtype=torch.int64),
        "token_tags": _empty(length, dtype=torch.int64),
        "position_ids": _empty(length, 3, dtype=torch.float32),
        "video_indices": places[512 : 512 + tokens].to("meta"),
        "audio_indices": places[512 + tokens :].to("meta"),
        "text_indices": places[:512].to("meta"),
    }


def ltx2(tokens: int) -> dict[str, Any]:
    """A stream of frames, and one of their sound."""
    return {
        "hidden_states": _empty(1, tokens, 128),
        "audio_hidden_states": _empty(1, 126, 128),
        "encoder_hidden_states": _empty(1, 1024, 4096),
        "audio_encoder_hidden_states": _empty(1, 1024, 2048),
        "timestep": _empty(1),
        "sigma": _empty(1),
        "encoder_attention_mask": _empty(1, 1024),
        "audio_encoder_attention_mask": _empty(1, 1024),
        "num_frames": 16,
        "height": 16,
        "width": tokens // 256,
        "audio_num_frames": 126,
    }


_GATES = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)
LTX_2_3 = {**_GATES, "use_prompt_embeddings": False, "rope_type": "split"}
DENOISERS = {
    "LTX-2.3": Denoiser("LTX2VideoTransformer3DModel", 0.136, ltx2, LTX_2_3),
    "Krea 2": Denoiser("Krea2Transformer2DModel", 0.134, krea2, {}),
    "MiniMax-H3": Denoiser("MiniMaxH3Transformer3DModel", 0.158, minimax_h3, {}),
    "Ideogram 4": Denoiser("Ideogram4Transformer2DModel", 0.603, ideogram4, {}),
}


def peaks(denoiser: Denoiser) -> list[int]:
    """Bytes of activations alive at most in a pass, its inputs among them, for each number of `TOKENS`."""
    import diffusers

    before = torch.get_default_dtype()
    torch.set_default_dtype(BFLOAT16)
    try:
        with torch.device("meta"):
            network = getattr(diffusers, denoiser.class_name)(**denoiser.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    seen = []
    for tokens in TOKENS:
        arguments = denoiser.inputs(tokens)
        inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        with torch.no_grad(), absent_numbers():
            call = trace_call(lambda: network(**arguments), [network], inputs, device="cuda")  # noqa: B023
        seen.append(call.peak)
    return seen


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    head = [f"{tokens:,} tokens" for tokens in TOKENS]
    lines = [f"| denoiser | {' | '.join(head)} | GiB per 1,000 tokens | published | ratio |", "|---" * 7 + "|"]
    for name, denoiser in DENOISERS.items():
        seen = peaks(denoiser)
        points = list(zip(TOKENS, seen, strict=True))
        slopes = [(b - a) / GIB / (m - n) * 1000 for (n, a), (m, b) in pairwise(points)]
        cells = [f"{nbytes / GIB:.2f} GiB" for nbytes in seen]
        grown = " to ".join(f"{slope:.3f}" for slope in slopes)
        ratio = f"{slopes[0] / denoiser.published:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {grown} | {denoiser.published} | {ratio} |")
        print(lines[-1], flush=True)
    if options.out is not None:
        title = "# Activations of denoisers for each 1,000 tokens, in bfloat16, on a GPU\n\n"
        options.out.write_text(f"{title}{machine_in_words()}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
