"""Denoising steps of a transformer with the shapes of CogVideoX-5b, whose weights rest on disk.

    python benchmarks/cogvideox_5b_step.py [--frames 9] [--steps 1] [--layers 42] [--plans block leaf]

If `runs/cogvideox-5b` does not exist, it is written first: 5.57 billion random weights in bfloat16, 11 GB in six
shards, one shard at a time in memory. Speed and memory do not depend on their values. Then each plan makes `--steps`
steps in a fresh process: two videos (guidance), 226 tokens of text, `--frames` frames of 720x480 or of another size.
From the second step on, the order of the layers is known, and weights are loaded one layer ahead. `--layers` stops
after so many of the 42 layers. The time is then shorter and the peak the same, because one layer's weights leave when
the next layer's come. `peak_rss` is the kernel's high-water mark of the whole process, imports and mapped files
included; `step_peak_rss` is that of the steps alone. Times in seconds, sizes in bytes. Writes JSON and markdown to
`benchmarks/results/`. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare import HERE, describe_machine

SEED = 0
TEXT_TOKENS = 226
SHARD_BYTES = 2 * 10**9
PACKAGES = ("lowtide", "torch")
CONFIG = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": TEXT_TOKENS,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_layers": 42,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
    "use_rotary_positional_embeddings": True,
}


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(some_steps(options)))
        return
    if not options.model.is_dir():
        write_checkpoint(options.model)
    runs = {}
    for plan in options.plans:
        runs[plan] = in_fresh_process(plan, options)
        last, peak = runs[plan]["steps"][-1], runs[plan]["peak_rss"]
        print(f"{plan}: {last:.1f} s, {peak / 1e9:.2f} GB, sample {runs[plan]['mean']}", flush=True)
    write(runs, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/cogvideox-5b"))
    parser.add_argument("--frames", type=int, default=9, help="of the video; a quarter of them, and one, are latents")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"], help="stop after so many")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--plans", nargs="+", choices=("block", "leaf", "sequential", "model"), default=["block", "leaf"]
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the checkpoint


def write_checkpoint(folder: Path) -> None:
    """Write `config.json`, the shards and their index; the folder gets its name when it is complete."""
    import torch

    from lowtide import CogVideoXTransformer3DModel
    from lowtide.configs import write_json
    from lowtide.models.mixin import PEER_VERSION, WEIGHTS_NAME

    with torch.device("meta"):
        state = CogVideoXTransformer3DModel.from_config(CONFIG).state_dict()
    shards = split(state)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    names = [f"{WEIGHTS_NAME}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        write_shard(part / name, {key: state[key].shape for key in shard}, SEED + number)
        print(f"{name}: {(part / name).stat().st_size / 1e9:.2f} GB", flush=True)
    own = {"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": PEER_VERSION}
    write_json(part / "config.json", {**CONFIG, **own})
    total = 2 * sum(tensor.numel() for tensor in state.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    write_json(
        part / f"{WEIGHTS_NAME}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    part.rename(folder)


def split(state: dict[str, Any]) -> list[list[str]]:
    """The names of each shard's tensors, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for key, tensor in state.items():
        if used and used + 2 * tensor.numel() > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += 2 * tensor.numel()
    return shards


def write_shard(file: Path, shapes: dict[str, Any], seed: int) -> None:
    """Draw one shard's weights and write them: matrices around 0, scales of norms around 1."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        tensors[key] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        if len(shape) == 1 and key.endswith("weight"):
            tensors[key] += 1
    save_file(tensors, file, {"format": "pt"})


# ---- the steps


def in_fresh_process(plan: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", plan]
    for name in ("model", "frames", "height", "width", "layers", "steps", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def some_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model under the plan, call it, and return what that took."""
    import torch

    from lowtide import CogVideoXTransformer3DModel
    from lowtide.measuring.peaks import PeakSource, process_peak
    from lowtide.memory import attachment_of, steady_malloc
    from lowtide.models.video_positions import rotary_embedding

    torch.set_num_threads(options.threads)
    steady_malloc(mmap_threshold=8 * 2**20, trim_threshold=64 * 2**20)  # as `lowtide generate` does
    began = time.perf_counter()
    model = CogVideoXTransformer3DModel.from_pretrained(
        options.model, dtype=torch.bfloat16, offload=options.child, offload_device="cpu"
    )
    del model.transformer_blocks[options.layers :]
    loaded = time.perf_counter()
    size = ((options.frames - 1) // 4 + 1, options.height // 8, options.width // 8)
    torch.manual_seed(SEED)
    inputs = {
        "hidden_states": torch.randn(1, size[0], 16, *size[1:], dtype=torch.bfloat16).repeat(2, 1, 1, 1, 1),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 4096, dtype=torch.bfloat16),
        "timestep": torch.tensor([999, 999]),
        "image_rotary_emb": rotary_embedding(model.config, size[1], size[2], size[0]),
    }
    before = process_peak() or 0
    peaks = PeakSource()
    peaks.start()
    marks, sample = [time.perf_counter()], torch.empty(0)
    with torch.inference_mode():
        for _ in range(options.steps):
            sample = model(**inputs).sample
            marks.append(time.perf_counter())
    peaks.stop()
    found = peaks.take()
    assert sample.isfinite().all()
    attachment = attachment_of(model)
    assert attachment is not None
    ledger = attachment.stream.ledger
    return {
        "plan": options.child,
        "dtype": "bfloat16",
        "latents": list(inputs["hidden_states"].shape),
        "tokens": TEXT_TOKENS + size[0] * (size[1] // 2) * (size[2] // 2),
        "layers": options.layers,
        "threads": options.threads,
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in PACKAGES}},
        "load": loaded - began,
        "steps": [end - start for start, end in itertools.pairwise(marks)],
        "peak_rss": max(before, found.rss),
        "step_peak_rss": found.rss,
        "step_peak_anonymous": found.anonymous,
        "weights_peak": ledger.peak,
        "weights_bound": attachment.bound,
        "moved": ledger.moved,
        "stalled": ledger.stalled,
        "mean": float(sample.double().mean()),
        "std": float(sample.double().std()),
    }


# ---- the report


def write(runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    about = describe_machine("benchmarks/cogvideox_5b_step.py", next(iter(runs.values())))
    cut = "" if options.layers == CONFIG["num_layers"] else f"-{options.layers}layers"
    name = f"cogvideox-5b-step-{options.frames}x{options.height}x{options.width}{cut}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    first = next(iter(runs.values()))
    lines = [
        f"# Denoising steps of CogVideoX-5b shapes: {options.frames} frames of {options.width}x{options.height}, "
        f"{first['tokens']} tokens, batch 2, {first['layers']} of 42 layers, bfloat16, weights on disk",
        "",
        "Each plan runs in a fresh process. Peak RSS is that of the whole process, mapped files included.",
        "",
        "| | each step, s | peak RSS, GB | anonymous of it (sampled), GB | weights: peak ≤ bound, MB | moved, GB |",
        "|---|---|---|---|---|---|",
        *(row(plan, run) for plan, run in runs.items()),
        "",
        *(f"- {key}: {value}" for key, value in about.items()),
        "",
    ]
    (options.out / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines))


def row(plan: str, run: dict[str, Any]) -> str:
    steps = ", ".join(f"{step:.1f}" for step in run["steps"])
    return (
        f"| {plan} | {steps} | {run['peak_rss'] / 1e9:.2f} | {run['step_peak_anonymous'] / 1e9:.2f} | "
        f"{run['weights_peak'] / 1e6:.0f} ≤ {run['weights_bound'] / 1e6:.0f} | {run['moved'] / 1e9:.1f} |"
    )


if __name__ == "__main__":
    main()
