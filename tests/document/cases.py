"""What is run, and everything that is replaced before it runs.

On a machine with a GPU only the import name and the model id are replaced. Without one the device string is, too; and,
listed here one by one, numbers that would take a CPU too long.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.document.snippets import Replacement, replaced, stored

MODEL_ID, VIDEO_ID = '"stable-diffusion-v1-5/stable-diffusion-v1-5"', '"THUDM/CogVideoX-5b"'
SLICING, TILING, SEQUENTIAL, MODEL_OFFLOAD, GROUP, CASTING, CHANNELS_LAST, TRACE, TRACED, XFORMERS = range(10)
"""The document's snippets, in its order."""

# For every snippet: how often the import name, the model id, the device string and the CUDA clock stand in it.
COUNTS = {
    SLICING: (1, 1, 1, 0),
    TILING: (1, 1, 1, 0),
    SEQUENTIAL: (1, 1, 0, 0),
    MODEL_OFFLOAD: (1, 1, 0, 0),
    GROUP: (3, 1, 1, 0),
    CASTING: (2, 1, 1, 0),
    CHANNELS_LAST: (0, 0, 0, 0),
    TRACE: (1, 1, 4, 4),
    TRACED: (1, 1, 1, 0),
    XFORMERS: (1, 1, 1, 0),
}
VIDEO_CASES = ("group-offload", "fp8-casting")
"""Those of `CASES` that need a checkpoint of CogVideoX."""
_VIDEO_NUMBERS = (GROUP, CASTING)


def model_id(number: int) -> str:
    """The model id that stands in a snippet, in its quotes."""
    return VIDEO_ID if number in _VIDEO_NUMBERS else MODEL_ID


@dataclass(frozen=True)
class Step:
    """A snippet in a process of its own; `evidence` is asked there at its end.

    `before` takes from the first snippet's text what the document has its reader run before this one; `printed` gives
    what must be printed, from the denoiser's configuration.
    """

    number: int
    evidence: str
    before: Callable[[str], str] = lambda _: ""
    printed: Callable[[dict[str, Any]], list[str]] = lambda _: []


def _loading(first: str) -> str:
    """The first snippet up to its prompt: `torch`, `pipe` and `prompt`."""
    return first.split("pipe.enable_vae_slicing()", maxsplit=1)[0]


def _prompt(first: str) -> str:
    """The first snippet's line that sets `prompt`."""
    return next(line for line in first.splitlines(keepends=True) if line.startswith("prompt = "))


def _strides(unet: dict[str, Any]) -> list[str]:
    """What is printed of `conv_out` before and after: (2880, 9, 3, 1) and (2880, 1, 960, 320) with 320 channels."""
    c = unet["block_out_channels"][0]
    return [str((9 * c, 9, 3, 1)), str((9 * c, 1, 3 * c, c))]


def _peak(_: dict[str, Any]) -> list[str]:
    return ["Max memory reserved: "]


def _stages(_: dict[str, Any]) -> list[str]:
    return ["tracing..", "done tracing", "unet traced inference took", "unet inference took"]


CLIP = "evidence.clip(video, frames={frames}, size={own}); evidence.is_film('output.mp4')"
ONE = "evidence.pictures([image], count=1, size={own})"
CASES = {
    "vae-slicing": (Step(SLICING, "evidence.pictures(images, count={pictures}, size={own})"),),
    "vae-tiling": (Step(TILING, "evidence.pictures([image], count=1, size={large})"),),
    "sequential-offload": (Step(SEQUENTIAL, f"{ONE}; evidence.offloaded(pipe)"),),
    "model-offload": (Step(MODEL_OFFLOAD, f"{ONE}; evidence.offloaded(pipe)"),),
    "group-offload": (Step(GROUP, f"{CLIP}; evidence.offloaded(pipe)", printed=_peak),),
    "fp8-casting": (Step(CASTING, f"{CLIP}; evidence.cast(pipe, 'transformer')"),),
    # The document has `pipe` and `torch` from an earlier snippet here.
    "channels-last": (Step(CHANNELS_LAST, "evidence.channels_last(pipe, size={own})", _loading, _strides),),
    # The second script loads the file that the first one saved, and has `prompt` from an earlier snippet.
    "tracing": (
        Step(TRACE, "evidence.is_saved('unet_traced.pt')", printed=_stages),
        Step(TRACED, f"{ONE}; evidence.same_as_untraced(unet_traced, {{model}}, pipe.vae.dtype, {{device}})", _prompt),
    ),
    "xformers": (Step(XFORMERS, "evidence.pictures(sample.images, count=1, size={own})"),),
}


@dataclass(frozen=True)
class Setting:
    """Where the document is run: a checkpoint, a device, and the replacements besides the three that it promises."""

    model: Path
    device: str = "cpu"
    fewer: dict[int, tuple[Replacement, ...]] = field(default_factory=dict)
    pictures: int = 32
    large: tuple[int, int] = (3840, 2224)

    @property
    def denoiser(self) -> dict[str, Any]:
        """The configuration of the checkpoint's U-Net or transformer."""
        files = [self.model / name / "config.json" for name in ("unet", "transformer")]
        return json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of what the checkpoint makes by itself."""
        config = self.denoiser
        sides = [config.get(name, config.get("sample_size")) for name in ("sample_width", "sample_height")]
        return sides[0] * 8, sides[1] * 8


def source_of(number: int, setting: Setting) -> str:
    """The text to run: a snippet with what `setting` replaces, and nothing else changed."""
    imports, models, devices, clocks = COUNTS[number]
    table = [
        Replacement("diffusers", "lowtide", imports, "the import name"),
        Replacement(model_id(number), json.dumps(str(setting.model)), models, "the model id: there is no network"),
    ]
    if setting.device != "cuda":
        table += [
            Replacement('"cuda"', json.dumps(setting.device), devices, "the device string: there is no GPU"),
            # PyTorch without CUDA raises here, whatever the library; its CPU has the same call.
            Replacement("torch.cuda.synchronize()", "torch.cpu.synchronize()", clocks, "the same for the clock"),
        ]
    return replaced(stored()[number].code, [*table, *setting.fewer.get(number, ())])


def script_of(step: Step, setting: Setting) -> str:
    """A script: what was run before, the snippet, and the questions at the end."""
    facts = {
        "pictures": setting.pictures,
        "large": setting.large,
        "own": setting.size,
        "frames": setting.denoiser.get("sample_frames"),
        "model": repr(str(setting.model)),
        "device": repr(setting.device),
    }
    questions = ["from tests.document import evidence", "evidence.of_this_tree()", step.evidence.format(**facts), ""]
    before = "" if step.number in _VIDEO_NUMBERS else step.before(source_of(SLICING, setting))
    return "\n".join([before, source_of(step.number, setting), *questions])


def fewer(*entries: tuple[int, str, str, int], why: str) -> dict[int, tuple[Replacement, ...]]:
    """Replacements by snippet, of entries (snippet, old, new, count)."""
    table: dict[int, tuple[Replacement, ...]] = {}
    for number, old, new, count in entries:
        table[number] = (*table.get(number, ()), Replacement(old, new, count, why))
    return table


LARGE = "width=3840, height=2224, num_inference_steps=20"

TINY = fewer(
    (SLICING, "[prompt] * 32", "[prompt] * 32, num_inference_steps=2", 1),
    (TILING, LARGE, "width=384, height=224, num_inference_steps=2", 1),
    (SEQUENTIAL, "pipe(prompt)", "pipe(prompt, num_inference_steps=2)", 1),
    (MODEL_OFFLOAD, "pipe(prompt)", "pipe(prompt, num_inference_steps=2)", 1),
    (GROUP, "num_inference_steps=50", "num_inference_steps=1", 1),
    (CASTING, "num_inference_steps=50", "num_inference_steps=1", 1),
    (TRACE, "unet_runs_per_experiment = 50", "unet_runs_per_experiment = 2", 1),
    (TRACE, "range(5)", "range(2)", 1),
    (TRACED, "num_inference_steps=50", "num_inference_steps=2", 1),
    (XFORMERS, 'pipe("a small cat")', 'pipe("a small cat", num_inference_steps=2)', 1),
    why="the default suite is fast, also where float16 is emulated; the slow one runs it verbatim",
)
TINY_LARGE = (384, 224)

SHIPPED = {
    **fewer(
        (TILING, LARGE, "width=960, height=560, num_inference_steps=20", 1),
        why="this U-Net attends at its finest level: 133 440 tokens squared, three times a step",
    ),
    **fewer(
        (TRACE, "(2, 4, 64, 64)", "(2, 4, 16, 16)", 1),
        (TRACE, "(2, 77, 768)", "(2, 40, 160)", 1),
        why="the shapes of this model: 128x128 pixels, 40 tokens of width 160",
    ),
}
SHIPPED_LARGE = (960, 560)

SD15 = fewer(
    (SLICING, "[prompt] * 32", "[prompt] * 2, num_inference_steps=1", 1),
    (TILING, LARGE, "width=768, height=576, num_inference_steps=1", 1),
    (SEQUENTIAL, "pipe(prompt)", "pipe(prompt, num_inference_steps=1)", 1),
    (MODEL_OFFLOAD, "pipe(prompt)", "pipe(prompt, num_inference_steps=1)", 1),
    (TRACE, "n_experiments = 2", "n_experiments = 1", 1),
    (TRACE, "unet_runs_per_experiment = 50", "unet_runs_per_experiment = 1", 1),
    (TRACE, "range(3)", "range(1)", 1),
    (TRACE, "range(5)", "range(1)", 1),
    (TRACED, "num_inference_steps=50", "num_inference_steps=1", 1),
    (XFORMERS, 'pipe("a small cat")', 'pipe("a small cat", num_inference_steps=1)', 1),
    why="a U-Net call of these shapes is 1.6 TFLOP: seconds on a CPU",
)
SD15_LARGE = (768, 576)


def for_this_cpu(table: dict[int, tuple[Replacement, ...]]) -> dict[int, tuple[Replacement, ...]]:
    """`table`, and bfloat16 for float16 where PyTorch would emulate float16: minutes for one call of the U-Net."""
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return table
    counts = {TRACE: 4, CHANNELS_LAST: 0, GROUP: 0, CASTING: 0}
    return {
        number: (
            *table.get(number, ()),
            Replacement("torch.float16", "torch.bfloat16", counts.get(number, 1), "float16 is emulated on this CPU"),
        )
        for number in COUNTS
    }
