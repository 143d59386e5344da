"""What entering and leaving a unit takes in Python alone: microseconds over a plain call, ours and the peer's.

    python benchmarks/overhead.py [--rounds 300]

Modules of tiny linear layers, whose weights are in host memory and work on the CPU: nothing is read or copied, so what
is left is bookkeeping. Each round calls every module once, plain ones too; a figure is the median, over the rounds, of
the difference to the plain call of the same round, divided by the number of leaves or blocks. Processor time of the one
thread that calls, so that other work on the machine counts little. The peer refuses streams on a CPU
(`use_stream=True`), so its hooks run without. Writes markdown to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from compare import HERE, machine_in_words
from lowtide.memory import apply_residency

WIDTH, BLOCKS, LEAVES = 8, 16, 4
LEVELS = ("leaf", "block")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LEAVES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def ours(level: str, prefetch: int) -> nn.Module:
    module = Blocks().eval().requires_grad_(False)
    apply_residency(module, rest="host", level=level, prefetch=prefetch, device="cpu")
    return module


def peers(level: str) -> nn.Module:
    module = Blocks().eval().requires_grad_(False)
    device = torch.device("cpu")
    apply_group_offloading(module, device, device, offload_type=f"{level}_level", num_blocks_per_group=1)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        "lowtide, prefetch=0": lambda level: ours(level, 0),
        "lowtide, prefetch=1": lambda level: ours(level, 1),
        "diffusers, no stream": peers,
    }
    found = {level: measure({name: make(level) for name, make in rows.items()}, options.rounds) for level in LEVELS}
    text = table(found)
    print(text)
    title, _, about = (__doc__ or "").partition("\n")
    notes = " ".join(about.split("\n\n")[1].split())
    content = [f"# {title}", notes, text, f"{options.rounds} rounds. {machine_in_words()}", ""]
    (HERE / "results" / "overhead.md").write_text("\n\n".join(content).rstrip() + "\n")


def measure(modules: dict[str, nn.Module], rounds: int) -> dict[str, list[float]]:
    """For each module the seconds of its calls beyond those of a plain one in the same round."""
    plain, x = Blocks().eval().requires_grad_(False), torch.randn(1, WIDTH)
    found: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for module in (plain, *modules.values()):
            for _ in range(20):
                module(x)
        gc.disable()
        for _ in range(rounds):
            base = seconds(plain, x)
            for name, module in modules.items():
                found[name].append(seconds(module, x) - base)
        gc.enable()
    return found


def seconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    began = time.thread_time()
    call(x)
    return time.thread_time() - began


def table(found: dict[str, dict[str, list[float]]]) -> str:
    counts = {"leaf": BLOCKS * LEAVES, "block": BLOCKS}
    lines = ["| | " + " | ".join(f"a {level}, µs (quartiles)" for level in found) + " |", "|---|" + "---|" * len(found)]
    for name in found[LEVELS[0]]:
        cells = [in_words(found[level][name], counts[level]) for level in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(differences: list[float], count: int) -> str:
    low, middle, high = statistics.quantiles([value / count * 1e6 for value in differences], n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
