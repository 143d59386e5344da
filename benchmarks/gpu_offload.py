"""Step times of a U-Net on a GPU under partial residency, against the physical limit and diffusers' group offload.

    python benchmarks/gpu_offload.py [--steps 20] [--size 512] [--batch 2] [--dtype float16] [--out results.json]

The U-Net has Stable Diffusion 1.5 shapes and random weights; no checkpoint is needed. The rows are: everything
resident; 0, 25, 50 and 75 % of the weights resident and the others streamed block by block; leaf by leaf; and the
leaf-level group offload of diffusers with a stream. `limit` is max(compute, streamed bytes / link rate). Both are
measured here: the compute time on the resident row, the link rate on one large pinned copy. Each row runs in a fresh
process; `--row` runs one row in this process. Times in seconds (medians over the steps, device clock), sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from make_sd15 import UNET

ROWS = ("resident", "share 0", "share 25", "share 50", "share 75", "leaf", "peer leaf", "peer resident")


def main() -> None:
    options = parse()
    if options.row is not None:
        print(json.dumps(measure(options)))
        return
    rows = {row: one_process(row) for row in ROWS}
    summarise(rows)
    about = {"command": "python " + " ".join(sys.argv), "python": platform.python_version()}
    text = json.dumps({**about, "rows": rows}, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def one_process(row: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--row", row]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_grad_enabled(False)
    dtype = getattr(torch, options.dtype)
    model = build(options.row, dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    host_before = host_peak()
    applied = apply(model, options.row, weights)
    side = options.size // 8
    inputs = (
        torch.randn(options.batch, 4, side, side, device="cuda", dtype=dtype),
        torch.tensor(500, device="cuda"),
        torch.randn(options.batch, 77, 768, device="cuda", dtype=dtype),
    )
    for _ in range(3):
        model(*inputs)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    times = [timed(lambda: model(*inputs)) for _ in range(options.steps)]
    found = {
        "step": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "new_segments_in_steps": torch.cuda.memory_stats()["segment.all.allocated"] - segments,
        "weights": weights,
        "host_peak": host_peak(),
        "host_peak_before_the_plan": host_before,
        "link_rate": link_rate(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "lowtide", "diffusers")},
    }
    if applied is not None:
        ledger = applied.stream.ledger
        streamed = sum(ledger.by_unit[unit.name].nbytes for unit in applied.units if not unit.stays)
        found |= {"streamed": streamed, "weights_peak": ledger.peak, "weights_bound": applied.bound}
    return found


def build(row: str, dtype: Any) -> Any:
    """Lowtide's or diffusers' U-Net, with random weights, on the host."""
    import torch

    if row.startswith("peer"):
        from diffusers import UNet2DConditionModel
    else:
        from lowtide import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).to(dtype).eval()


def apply(model: Any, row: str, weights: int) -> Any:
    """Put the model under the row's plan; returns the attachment where the plan is one of Lowtide's."""
    import torch

    if row.endswith("resident"):
        model.to("cuda")
        return None
    if row == "peer leaf":
        model.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
        return None
    from lowtide.memory import apply_residency

    if row == "leaf":
        return apply_residency(model, level="leaf", device="cuda")
    return apply_residency(model, int(weights * int(row.split()[1]) / 100), device="cuda")


def timed(call: Any) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def link_rate(nbytes: int = 2**30) -> float:
    """Bytes per second of one copy from pinned memory to the device."""
    import torch

    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    device.copy_(host)
    return nbytes / statistics.median(timed(lambda: device.copy_(host, non_blocking=True)) for _ in range(5))


def host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarise(rows: dict[str, dict[str, Any]]) -> None:
    """Add the physical limit to each row, and how close the row came to it."""
    compute = rows["resident"].get("step")
    for row in rows.values():
        if compute is not None and "streamed" in row:
            row["limit"] = max(compute, row["streamed"] / row["link_rate"])
            row["of_limit"] = row["step"] / row["limit"]
        peer = rows["peer leaf"].get("step")
        if peer is not None and "step" in row:
            row["of_peer_leaf"] = row["step"] / peer


if __name__ == "__main__":
    main()
