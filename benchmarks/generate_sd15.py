"""Make one picture with Lowtide or with diffusers in this process, and print what it took as JSON.

    python benchmarks/generate_sd15.py --library lowtide|diffusers [--plan block] [--dtype bfloat16] [--size 256]

Both libraries get the same checkpoint, scheduler (DDIM), prompt, seed, guidance (7.5) and number of threads. They are
measured at the same points: when the first call of the U-Net begins, when each step ends (`callback_on_step_end`), and
when the picture is complete. `peak_rss` is the kernel's high-water mark of the whole process, imports included.
`peak_anonymous` is sampled every 10 ms, so it is a lower bound. `--plan` says where the weights rest (see PLANS), and
`--cold` drops the checkpoint from the page cache first. `checksum` is that of the picture's bytes. Times in seconds,
sizes in bytes. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("lowtide", "diffusers")
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("lowtide", "diffusers", "transformers", "torch")
PROMPT = "a photo of an astronaut riding a horse on mars"
GUIDANCE = 7.5
SEED = 0


def main() -> None:
    options = parse()
    if options.cold:
        drop_from_cache(options.model)
    began = time.perf_counter()
    with anonymous_memory() as anonymous, tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        pipe = load(options)
        PLANS[options.library][options.plan](pipe, folder)
        loaded = time.perf_counter()
        marks, picture = generate(pipe, options)
    if options.picture is not None:
        picture.save(options.picture)
    checksum = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
    figures = {**marks.seconds(began, loaded), **memory(max(anonymous)), **moved(pipe), "checksum": checksum}
    print(json.dumps({**describe(options), **figures}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", type=int, default=256, help="pixels, high and wide")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", help="weight files to take, such as fp16")
    parser.add_argument("--model", type=Path, default=Path("runs/sd15"), help="from make_sd15.py")
    parser.add_argument("--plan", choices=sorted({*PLANS["lowtide"], *PLANS["diffusers"]}), default="resident")
    parser.add_argument(
        "--casting", choices=("fp8", "int8", "int4"), help="keep all weights in so few bits, cast while loading"
    )
    parser.add_argument("--cold", action="store_true", help="read everything from the disk")
    parser.add_argument("--picture", type=Path, help="save the picture here")
    return parser.parse_args()


def nothing(pipe: Any, folder: str) -> None:
    """All weights stay in memory."""


def grouped(kind: str) -> Callable[[Any, str], None]:
    """Our group offload on the CPU: weights rest in the checkpoint."""
    return lambda pipe, _: pipe.enable_group_offload("cpu", offload_type=f"{kind}_level", use_stream=True)


def plain_fp8(pipe: Any, _: str) -> None:
    """The U-Net's weights cast to e4m3fn, as the community's document casts them."""
    import torch

    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.unet.dtype)


def channels_last(pipe: Any, _: str) -> None:
    """The U-Net with channels last in memory."""
    import torch

    pipe.unet.to(memory_format=torch.channels_last)


def residency(share: float) -> Callable[[Any, str], None]:
    """Our partial residency of the U-Net, the rest of the pipeline by blocks."""

    def plan(pipe: Any, _: str) -> None:
        from lowtide.memory import apply_residency

        pipe.enable_group_offload("cpu", use_stream=True)
        nbytes = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
        apply_residency(pipe.unet, int(share * nbytes), rest="disk")

    return plan


def peer_grouped(kind: str) -> Callable[[Any, str], None]:
    """Group offload of diffusers to disk, the only one of its plans that lowers memory without a GPU."""

    def plan(pipe: Any, folder: str) -> None:
        import torch
        from diffusers.hooks import apply_group_offloading

        options = {"num_blocks_per_group": 1} if kind == "block" else {}
        for name in ("unet", "vae", "text_encoder"):
            where = Path(folder) / name
            where.mkdir()
            apply_group_offloading(
                getattr(pipe, name),
                onload_device=torch.device("cpu"),
                offload_type=f"{kind}_level",
                offload_to_disk_path=str(where),
                **options,
            )

    return plan


def accelerate_disk(pipe: Any, folder: str) -> None:
    """The disk offload of accelerate, on which the sequential offload of diffusers is built."""
    import torch
    from accelerate import disk_offload

    for name in ("unet", "vae", "text_encoder"):
        disk_offload(getattr(pipe, name), str(Path(folder) / name), execution_device=torch.device("cpu"))


PLANS: dict[str, dict[str, Callable[[Any, str], None]]] = {
    "lowtide": {
        "resident": nothing,
        "sequential": lambda pipe, _: pipe.enable_sequential_cpu_offload(device="cpu"),
        "model": lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"),
        "block": grouped("block"),
        "leaf": grouped("leaf"),
        "half": residency(0.5),
        "fp8": plain_fp8,
        "channels last": channels_last,
    },
    "diffusers": {
        "resident": nothing,
        "fp8": plain_fp8,
        "block": peer_grouped("block"),
        "leaf": peer_grouped("leaf"),
        "accelerate": accelerate_disk,
    },
}


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the pages of all files in `folder`."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def moved(pipe: Any) -> dict[str, Any]:
    """Figures of our ledger for the U-Net; empty for diffusers and for resident weights."""
    if "lowtide" not in sys.modules:
        return {}
    from lowtide.memory import attachment_of

    found = attachment_of(pipe.unet)
    if found is None:
        return {}
    ledger = found.stream.ledger
    return {"weights_peak": ledger.peak, "weights_bound": found.bound, "moved": ledger.moved, "stalled": ledger.stalled}


@dataclass
class Marks:
    """When each part of a run ended, in seconds of one clock."""

    calls: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    end: float = 0.0

    def call_begins(self, *_: Any) -> None:
        """A forward pre-hook of the U-Net."""
        self.calls.append(time.perf_counter())

    def step_ended(self, _pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """A `callback_on_step_end`."""
        self.steps.append(time.perf_counter())
        return tensors

    def seconds(self, began: float, loaded: float) -> dict[str, float]:
        """Seconds of each stage. `load` includes importing the library; `decode` is everything after the last step."""
        return {
            "load": loaded - began,
            "encode_prompt": self.calls[0] - loaded,
            "denoise": self.steps[-1] - self.calls[0],
            "first_step": self.steps[0] - self.calls[0],
            "other_steps": self.steps[-1] - self.steps[0],
            "decode": self.end - self.steps[-1],
            "total": self.end - began,
        }


def load(options: argparse.Namespace) -> Any:
    """Import the library and load the pipeline, with the scheduler that both libraries use here."""
    import torch

    torch.set_num_threads(options.threads)
    if options.library == "lowtide":
        from lowtide import DDIMScheduler, StableDiffusionPipeline
        from lowtide.memory import steady_malloc

        steady_malloc(mmap_threshold=8 * 2**20, trim_threshold=64 * 2**20)  # as `lowtide generate` does
    else:
        from diffusers import DDIMScheduler, StableDiffusionPipeline
    casting = {} if options.casting is None else {"casting": options.casting}
    pipe = StableDiffusionPipeline.from_pretrained(
        options.model, torch_dtype=getattr(torch, options.dtype), variant=options.variant, **casting
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, options: argparse.Namespace) -> tuple[Marks, Any]:
    """Call the pipeline once; return when its parts were done, and the picture."""
    import torch

    marks = Marks()
    pipe.unet.register_forward_pre_hook(marks.call_begins)
    picture = pipe(
        PROMPT,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        callback_on_step_end=marks.step_ended,
    ).images[0]
    marks.end = time.perf_counter()
    assert len(marks.calls) == len(marks.steps) == options.steps
    return marks, picture


@contextmanager
def anonymous_memory(interval: float = 0.01) -> Iterator[list[int]]:
    """Give a list that a thread fills with the bytes of anonymous memory in use."""
    done, samples = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(interval):
            resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
            samples.append((int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def memory(peak_anonymous: int) -> dict[str, int]:
    """Peaks of this process in bytes."""
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak_kib = next(int(row.split()[1]) for row in rows if row.startswith("VmHWM:"))
    return {"peak_rss": peak_kib * 1024, "peak_anonymous": peak_anonymous}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the run, and the versions of the libraries."""
    settings = {
        key: getattr(options, key)
        for key in ("library", "plan", "casting", "cold", "dtype", "size", "steps", "threads", "variant")
    }
    versions = {package: version(package) for package in PACKAGES}
    return {**settings, "versions": {"python": sys.version.split()[0], **versions}}


if __name__ == "__main__":
    main()
