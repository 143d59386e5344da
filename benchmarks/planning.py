"""How long planning takes for Stable Diffusion 1.5 and CogVideoX-5b, from configurations alone, without imports.

    python benchmarks/planning.py [--rounds 3] [--guest FOLDER [NAME=NUMBER...]]

With `--guest` it is the pipeline of diffusers whose configurations are in a folder, called with these arguments. Each
round is a fresh process: the first plan of a process is the slowest. Prints a table with medians of the processor time,
which other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare import machine_in_words

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TEXT = {"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
T5 = {"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "vocab_size": 32128}  # fmt: skip
PARTS: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "StableDiffusionPipeline": {
        "unet": ("diffusers", "UNet2DConditionModel", UNET),
        "vae": ("diffusers", "AutoencoderKL", {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}),
        "text_encoder": ("transformers", "CLIPTextModel", {**TEXT, "num_hidden_layers": 12, "vocab_size": 49408}),
        "tokenizer": ("transformers", "CLIPTokenizer", {}),
        "scheduler": ("diffusers", "DDIMScheduler", {**SCALED, "steps_offset": 1, "clip_sample": False}),
    },
    "CogVideoXPipeline": {
        "transformer": ("diffusers", "CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42,
            "use_rotary_positional_embeddings": True}),
        "vae": ("diffusers", "AutoencoderKLCogVideoX", {"scaling_factor": 0.7}),
        "text_encoder": ("transformers", "T5EncoderModel", T5),
        "tokenizer": ("transformers", "T5Tokenizer", {}),
        "scheduler": ("diffusers", "CogVideoXDPMScheduler", {**SCALED, "snr_shift_scale": 1.0}),
    },
}  # fmt: skip
BUDGETS = {"StableDiffusionPipeline": "1GB", "CogVideoXPipeline": "8GB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guest", nargs="+", metavar=("FOLDER", "NAME=NUMBER"))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, *call = options.child
        print(json.dumps(seconds(name, folder) if name in PARTS else seconds_of_guest(folder, call)))
        return
    print("| model | trace, s | choose, s | together, s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        models = {name: [str(Path(scratch) / name)] for name in PARTS}
        for name, (folder,) in models.items():
            write(Path(folder), name)
        for name, given in ({Path(options.guest[0]).name: options.guest} if options.guest else models).items():
            taken = [one_process(name, given) for _ in range(options.rounds)]
            cells = [statistics.median(column) for column in zip(*taken, strict=True)]
            print(
                f"| {name} | {cells[0]:.2f} | {cells[1]:.2f} | {statistics.median(map(sum, taken)):.2f} |", flush=True
            )
    print(machine_in_words())


def write(folder: Path, name: str) -> None:
    """Write a folder that holds configurations and nothing else."""
    index: dict[str, Any] = {"_class_name": name}
    for part, (library, kind, config) in PARTS[name].items():
        (folder / part).mkdir(parents=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps({"_class_name": kind, **config}), encoding="utf-8")
        index[part] = [library, kind]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def one_process(name: str, given: list[str]) -> list[float]:
    command = [sys.executable, __file__, "--child", name, *given]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def seconds(name: str, folder: str) -> list[float]:
    """Seconds to trace, and seconds to choose. Rates that are not known yet are measured before."""
    import time

    import torch

    import lowtide
    from lowtide.fitting.budgets import parse_budgets
    from lowtide.pipelines.load import prepare_checkpoint
    from lowtide.planning.machine_rates import machine_rates

    cpu, _ = torch.device("cpu"), getattr(lowtide, name)
    machine_rates(cpu, torch.bfloat16)
    began = time.process_time()
    fit = prepare_checkpoint(folder, parse_budgets(cpu, ram=BUDGETS[name]), device=cpu, dtype=torch.bfloat16)
    traced = time.process_time()
    fit.choose()
    return [traced - began, time.process_time() - traced]


def seconds_of_guest(folder: str, call: list[str]) -> list[float]:
    """The same for a pipeline of diffusers."""
    import time

    import torch

    from lowtide.fitting.budgets import parse_budgets
    from lowtide.guests.checkpoint import GuestCheckpoint
    from lowtide.hub import Source
    from lowtide.planning.machine_rates import machine_rates

    cpu, numbers = torch.device("cpu"), {name: int(number) for name, number in (each.split("=") for each in call)}
    machine_rates(cpu, torch.bfloat16)
    checkpoint = GuestCheckpoint.opened(Source(folder), numbers, torch.bfloat16, None, None)
    checkpoint.parts(may_lack_weights=True)  # imports what it needs
    began = time.process_time()
    parts = checkpoint.parts(may_lack_weights=True)
    fit = checkpoint.prepared(parts, parse_budgets(cpu, ram="8GB"), (), cpu)
    traced = time.process_time()
    fit.choose()
    return [traced - began, time.process_time() - traced]


if __name__ == "__main__":
    main()
