"""A step of Stable Diffusion 1.5 on a processor, beside OpenVINO, stable-diffusion.cpp and diffusers.

    pip install openvino stable-diffusion-cpp-python
    python benchmarks/rivals.py [--sizes 256 512] [--rounds 3] [--out benchmarks/results]

Each run is a process of its own; rounds alternate. A step is one call of the U-Net with guidance, two threads, random
weights of the true shapes (`make_sd15.py`, also with `--variant bf16`). Seconds are the median of a process's steps but
for the first, which is named apart: of the clock, and of the processor. The peak is the most resident memory that was
seen from outside in the whole run. OpenVINO runs the U-Net alone, in float32 from a file in float16, as its own
converter writes it; all others have the text encoder and the autoencoder too. stable-diffusion.cpp reads one file in
float16 and rounds its weights as it is told. A rival that is not installed is left out. Times in seconds, sizes in
bytes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from compare import machine_in_words
from outside import run_watched

THREADS = 2
STEPS, PLANNED = 5, 30
PACKAGES = ("openvino", "stable_diffusion_cpp_python", "diffusers")
MODULES = {"stable_diffusion_cpp_python": "stable_diffusion_cpp"}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
Took = list[tuple[float, float]]
"""Seconds of each step, by the clock and of the processor."""


def ours(model: Path, size: int, **options: Any) -> Took:
    """Lowtide within a budget, as planned for a picture of `PLANNED` steps."""
    import torch

    import lowtide

    call = {"height": size, "width": size, "num_inference_steps": STEPS}
    pipe = lowtide.load(str(model), dtype=torch.float32, **options, **{**call, "num_inference_steps": PLANNED})
    return steps_of(pipe, pipe.unet, call)


def peer(model: Path, size: int) -> Took:
    """diffusers, resident."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    return steps_of(pipe, pipe.unet, {"height": size, "width": size, "num_inference_steps": STEPS})


def steps_of(pipe: Any, network: Any, call: dict[str, Any]) -> Took:
    """The steps of a call that makes latents alone."""
    began: list[tuple[float, float]] = []
    took: Took = []
    network.register_forward_pre_hook(lambda *_: began.append(now()))
    network.register_forward_hook(lambda *_: took.append(since(began[-1])))
    pipe.set_progress_bar_config(disable=True)
    pipe("a red sailboat", output_type="latent", **call)
    return took


def openvino(model: Path, size: int) -> Took:
    """The U-Net as OpenVINO compiles it, on inputs of zeros."""
    import numpy as np
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(converted(model, size), "CPU", settings).create_infer_request()
    shapes = ((2, 4, size // 8, size // 8), (), (2, 77, 768))
    took: Took = []
    for _ in range(STEPS):
        begin = now()
        request.infer([np.zeros(shape, np.float32) for shape in shapes])
        took.append(since(begin))
    return took


def cpp(model: Path, size: int, kind: str) -> Took:
    """stable-diffusion.cpp, weights of a kind; the first step is from the call on, the encoder's part among it."""
    from stable_diffusion_cpp import StableDiffusion

    network = StableDiffusion(model_path=str(original(model)), n_threads=THREADS, wtype=kind, verbose=False)
    marks = [now()]
    network.generate_image(
        "a red sailboat",
        width=size,
        height=size,
        sample_steps=STEPS,
        sample_method="euler",
        progress_callback=lambda *_: marks.append(now()),
    )
    return [(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairwise(marks[1:])]


def original(model: Path) -> Path:
    """The whole model in one file, for stable-diffusion.cpp."""
    return model / "original-f16.safetensors"


def write_original(model: Path) -> None:
    """Write it, in float16 under the names of the first published file."""
    import torch
    from safetensors.torch import save_file

    from lowtide import StableDiffusionPipeline
    from lowtide.loading.original_names import CLIP_NAMES, unet_names, vae_names
    from lowtide.loading.original_weights import CLIP, UNET, VAE

    pipe = StableDiffusionPipeline.from_pretrained(model)
    parts = (
        (pipe.unet, UNET, unet_names(pipe.unet.config)),
        (pipe.vae, VAE[0], vae_names(pipe.vae.config)),
        (pipe.text_encoder, CLIP[0], CLIP_NAMES),
    )
    state: dict[str, torch.Tensor] = {}
    for network, begin, names in parts:
        for name, tensor in network.state_dict().items():
            as_there = tensor[..., None, None] if network is pipe.vae and tensor.dim() == 2 else tensor
            state[begin + names.place(name).name] = as_there.half().contiguous()
    save_file(state, original(model))


def converted(model: Path, size: int) -> Path:
    """Where OpenVINO's file for this size is."""
    return model / "openvino" / f"unet-{size}.xml"


def convert(model: Path, size: int) -> None:
    """Write OpenVINO's file, weights in float16."""
    import openvino as ov
    import torch

    from lowtide import UNet2DConditionModel

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")

        def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.unet(x, time, encoder_hidden_states=text).sample

    example = (torch.zeros(2, 4, size // 8, size // 8), torch.tensor(500.0), torch.zeros(2, 77, 768))
    with torch.no_grad():
        made = ov.convert_model(Network(), example_input=example, input=[list(part.shape) for part in example])
    converted(model, size).parent.mkdir(exist_ok=True)
    ov.save_model(made, converted(model, size), compress_to_fp16=True)


def now() -> tuple[float, float]:
    """Seconds, by the clock and of the processor."""
    return time.perf_counter(), time.process_time()


def since(begin: tuple[float, float]) -> tuple[float, float]:
    """Both since then."""
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


RIVALS: dict[str, Callable[[Path, int], Took]] = {
    "Lowtide": lambda model, size: ours(model, size, ram="8GB"),
    "Lowtide, packed": lambda model, size: ours(model, size, ram="8GB", allow=("packed",)),
    "Lowtide, bf16 files, 1.1 GB": lambda model, size: ours(model, size, ram="1.1GB", variant="bf16"),
    "Lowtide, int8, 1.7 GB": lambda model, size: ours(model, size, ram="1.7GB", allow=("int8",)),
    "diffusers": peer,
    "OpenVINO": openvino,
    "stable-diffusion.cpp, f16": lambda model, size: cpp(model, size, "f16"),
    "stable-diffusion.cpp, q8_0": lambda model, size: cpp(model, size, "q8_0"),
    "stable-diffusion.cpp, q4_0": lambda model, size: cpp(model, size, "q4_0"),
}


def run_one(options: argparse.Namespace) -> None:
    """In a process of its own: one rival at one size."""
    if options.rival == "convert":
        convert(options.model, options.sizes[0])
        return
    if options.rival == "original":
        write_original(options.model)
        return
    took = RIVALS[options.rival](options.model, options.sizes[0])
    first, others = took[0], took[1:]
    wall, cpu = (median(step[place] for step in others) for place in (0, 1))
    print(json.dumps({"first": first[0], "step": wall, "cpu": cpu}))


def in_a_process(options: argparse.Namespace, rival: str, size: int) -> dict[str, float]:
    """What one run printed; {} of one that failed, which is said."""
    command = [sys.executable, __file__, "--rival", rival, "--sizes", str(size), "--model", str(options.model)]
    done, peak = run_watched(command, None)
    if done.returncode:
        print(f"{rival}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return {}
    return {**json.loads(done.stdout.splitlines()[-1]), "peak": peak} if done.stdout.strip() else {}


def compare(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by size and rival."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for size in options.sizes:
        for name, file in (("convert", converted(options.model, size)), ("original", original(options.model))):
            if not file.exists():
                in_a_process(options, name, size)
        runs: dict[str, list[dict[str, float]]] = {rival: [] for rival in RIVALS}
        for _ in range(options.rounds):
            for rival, kept in runs.items():
                made = in_a_process(options, rival, size)
                kept.extend([made] if made else [])
                print(size, rival, made, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        table[str(size)] = {
            rival: {name: median(run[name] for run in kept) for name in kept[0]} for rival, kept in runs.items() if kept
        }
    return table


def place() -> str:
    """The command, the machine, its instructions and the versions."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    rivals = [f"{package} {version(package)}" for package in PACKAGES if find_spec(MODULES.get(package, package))]
    instructions = ", ".join(flag for flag in FLAGS if flag in flags)
    return f"{machine_in_words()} {instructions}; {THREADS} threads; {', '.join(rivals)}."


def as_text(table: dict[str, dict[str, dict[str, float]]], options: argparse.Namespace) -> str:
    """The table as Markdown."""
    lines = [
        "# A step beside rivals",
        "",
        f"{place()} Medians of {options.rounds} processes; see the docstring.",
    ]
    for size, rows in table.items():
        best = rows.get("OpenVINO", {}).get("step")
        lines += ["", f"## {size}x{size}", "", "| | step, s | CPU s | of OpenVINO's | first step, s | peak, GB |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for rival, row in rows.items():
            ratio = f"{row['step'] / best:.2f}" if best else "-"
            lines.append(
                f"| {rival} | {row['step']:.2f} | {row['cpu']:.2f} | {ratio} | {row['first']:.2f} "
                f"| {row['peak'] / 1e9:.2f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Compare, or be one of those that are compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/sd15"), help="from make_sd15.py")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the folder for rivals.md")
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    if options.rival:
        run_one(options)
        return
    text = as_text(compare(options), options)
    print(text)
    if options.out is not None:
        (options.out / "rivals.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
