"""Whether `lowtide serve` loses work, makes wrong pictures or takes more memory than its budget, with much going wrong.

    python benchmarks/soak.py [--minutes 20] [--ram 1.2GB] [--kill-every 30] [--clients 4] [--out FILE.json]

Three models, mixed sizes: some requests are cancelled, some callers go away, and the process that computes is killed by
SIGKILL at intervals, once in the middle the server itself. Each result is compared with that of a plain run, and the
memory of all processes of the server with the budget. Before that, what serving adds to a plain call when nothing else
runs. Prints what it found, and exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from compare import machine_in_words

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import tiny_video
from tests.guests.families_unets import sdxl
from tests.serve.server import Server

import lowtide
from lowtide.cli.request import shipped_model
from lowtide.sizes import parse_bytes

SIZES = {
    "seascapes": [(128, 128, 6), (192, 128, 20), (256, 256, 12), (128, 256, 40)],
    "clips": [(48, 32, 4), (64, 48, 20)],
    "large": [(64, 48, 6), (96, 96, 30)],
}
"""Width, height and steps by model."""
SEEDS = range(3)
PROMPT = "a red boat on the sea"
OVERHEAD_CALLS = 30
SAMPLED = 0.2
"""Seconds between two looks at the memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--ram", default="1.2GB")
    parser.add_argument("--kill-every", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="A folder for results that are wrong.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = written_models(Path(scratch))
        print("making the pictures of plain runs ...", flush=True)
        expected = Expected(models)
        named = [f"{name}={path}" for name, path in models.items()]
        arguments = [*named, "--ram", options.ram, "--at-once", str(options.at_once), "--dtype", "float32"]
        server = Server(Path(scratch) / "served", *arguments)
        server.wait_until_ready()
        soak = Soak(server, expected, parse_bytes(options.ram), options.keep)
        soak.measure_overhead()
        print(f"overhead of a call: {soak.found['overhead_ms']:.0f} ms (median); soaking ...", flush=True)
        soak.run(60 * options.minutes, options.kill_every, options.clients)
        server.stop()
    found = {"machine": machine_in_words(), "command": " ".join(sys.argv), **soak.report()}
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(soak.wrong))


def written_models(folder: Path) -> dict[str, str]:
    tiny_video.write_checkpoint(folder / "clips")
    sdxl().pipeline.save_pretrained(folder / "large")
    return {"seascapes": str(shipped_model()), "clips": str(folder / "clips"), "large": str(folder / "large")}


class Expected:
    """Hashes of the results of plain runs."""

    def __init__(self, models: dict[str, str]) -> None:
        self.pipes = {
            name: lowtide.load(path, ram="8GB", device="cpu", dtype=torch.float32) for name, path in models.items()
        }
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
        self.hashes = {
            (model, *size, seed): self._plain(model, size, seed)
            for model, sizes in SIZES.items()
            for size in sizes
            for seed in SEEDS
        }

    def call(self, model: str, size: tuple[int, int, int]) -> dict[str, Any]:
        width, height, steps = size
        more = {"num_frames": 9} if model == "clips" else {}
        return {"prompt": PROMPT, "width": width, "height": height, "num_inference_steps": steps, **more}

    def _plain(self, model: str, size: tuple[int, int, int], seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        output = self.pipes[model](**self.call(model, size), generator=generator)
        if model == "clips":
            from lowtide.utils import export_to_video

            with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
                export_to_video(output.frames[0], file.name, fps=8)
                return hashlib.sha256(Path(file.name).read_bytes()).hexdigest()
        return hashlib.sha256(np.array(output.images[0]).tobytes()).hexdigest()


def hash_of(content: bytes, model: str) -> str:
    if model == "clips":
        return hashlib.sha256(content).hexdigest()
    import io

    return hashlib.sha256(np.array(Image.open(io.BytesIO(content))).tobytes()).hexdigest()


class Soak:
    """Clients, killers and a look at the memory, for a while."""

    def __init__(self, server: Server, expected: Expected, budget: int, keep: Path | None = None) -> None:
        self.server, self.expected, self.budget = server, expected, budget
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.samples: list[tuple[float, int]] = []
        self.peaks: list[float] = []
        self.ratios: list[float] = []
        self.keep = keep
        self.found: dict[str, Any] = {}
        self._ended = threading.Event()
        self._is_restarting = threading.Lock()

    def measure_overhead(self) -> None:
        size = SIZES["seascapes"][0]
        call, pipe = self.expected.call("seascapes", size), self.expected.pipes["seascapes"]
        asked = {"model": "seascapes", **{name: call[name] for name in ("prompt", "num_inference_steps")}}
        asked["size"] = f"{size[0]}x{size[1]}"
        plain: list[float] = []
        served: list[float] = []
        for seed in range(OVERHEAD_CALLS + 3):
            begun = time.perf_counter()
            pipe(**call, generator=torch.Generator().manual_seed(seed))
            middle = time.perf_counter()
            assert self.server.ask("POST", "/v1/images/generations", {**asked, "seed": seed})[0] == 200
            plain.append(middle - begun)
            served.append(time.perf_counter() - middle)
        self.found["plain_ms"] = 1e3 * statistics.median(plain[3:])
        self.found["overhead_ms"] = 1e3 * statistics.median([s - p for p, s in zip(plain[3:], served[3:], strict=True)])

    def run(self, seconds: float, kill_every: float, clients: int) -> None:
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(number, until)) for number in range(clients)]
        others = [
            threading.Thread(target=self._look, daemon=True),
            threading.Thread(target=self._kill, args=(kill_every, time.monotonic() + seconds / 2), daemon=True),
        ]
        for thread in (*threads, *others):
            thread.start()
        for thread in threads:
            thread.join()
        self._ended.set()
        for thread in others:
            thread.join()
        left = [job for state in ("queued", "running") for job in self._jobs(state)]
        if left:
            self.wrong.append(f"{len(left)} jobs have not ended")

    def _jobs(self, state: str) -> list[dict[str, Any]]:
        return self._asked("GET", f"/jobs?state={state}&most=1000")[1]["jobs"]

    def _asked(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        """An answer; where the server is being started anew, that of the new one."""
        while True:
            try:
                return self.server.ask(method, path, content, **headers)
            except (OSError, http.client.HTTPException, IndexError):
                time.sleep(0.3)

    # ---- what clients do

    def _client(self, number: int, until: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            model = chance.choices(list(SIZES), (6, 2, 2))[0]
            size, seed = chance.choice(SIZES[model]), chance.choice(SEEDS)
            action = chance.choices([self._whole, self._cancelled, self._gone], (8, 1, 1))[0]
            if model == "clips" and action == self._gone:
                action = self._whole
            try:
                action(model, size, seed, chance)
            except Exception as error:  # a fault of this script is no result
                self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}")

    def _submitted(self, model: str, size: tuple[int, int, int], seed: int, chance: random.Random) -> str | None:
        asked = {"model": model, **self.expected.call(model, size), "seed": seed}
        key = f"{chance.getrandbits(64):x}"  # so that asking again after a cut is no second job
        while True:
            status, job = self._asked("POST", "/jobs", asked, Idempotency_Key=key)
            if status == 202:
                self.counts["jobs"] += 1
                return job["id"]
            self.counts[f"answers with {status}"] += 1
            if status not in (429, 503):
                self.wrong.append(f"{status}: {job.get('detail')}")
                return None
            time.sleep(1)

    def _wait(self, job: str) -> dict[str, Any]:
        while True:
            status, content = self._asked("GET", f"/jobs/{job}")
            if status != 200:
                return {"state": "lost", "id": job}
            if content["state"] in ("done", "failed", "cancelled"):
                return content
            time.sleep(0.2)

    def _whole(self, model: str, size: tuple[int, int, int], seed: int, chance: random.Random) -> None:
        job = self._submitted(model, size, seed, chance)
        if job is None:
            return
        ended = self._wait(job)
        self.counts[f"whole: {ended['state']}"] += 1
        if ended["state"] != "done":
            self.wrong.append(f"job {job} is {ended['state']}: {ended.get('error')}")
            return
        self.counts["attempts beyond the first"] += ended["attempts"] - 1
        if ended["measured"]:
            self.ratios.append(ended["plan"]["peak"] / ended["measured"])
        content = self._asked("GET", f"/jobs/{job}/content/0")[1]
        if hash_of(content, model) != self.expected.hashes[(model, *size, seed)]:
            about = {name: ended[name] for name in ("attempts", "deaths", "alone")} | {
                "told": ended["plan"]["exactness"]
            }
            self.wrong.append(f"job {job} ({model}, {size}, seed {seed}) is another picture: {about}")
            if self.keep:
                (self.keep / f"{job}-{model}-{size}-{seed}").write_bytes(content)
                (self.keep / f"{job}.plan").write_text(ended["plan"]["plan"])

    def _cancelled(self, model: str, size: tuple[int, int, int], seed: int, chance: random.Random) -> None:
        job = self._submitted(model, size, seed, chance)
        if job is None:
            return
        time.sleep(chance.random() * 4)
        self._asked("POST", f"/jobs/{job}/cancel")
        self.counts[f"cancelled: {self._wait(job)['state']}"] += 1

    def _gone(self, model: str, size: tuple[int, int, int], seed: int, chance: random.Random) -> None:
        call = self.expected.call(model, size)
        asked = {name: call[name] for name in ("prompt", "num_inference_steps")}
        asked |= {"model": model, "size": f"{size[0]}x{size[1]}", "seed": seed}
        try:
            connection = http.client.HTTPConnection(self.server.address.removeprefix("http://"), timeout=60)
            body, headers = json.dumps(asked), {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", body, headers)
            time.sleep(chance.random() * 3)
            connection.close()
        except (OSError, IndexError):
            pass
        self.counts["callers who went away"] += 1

    # ---- what goes wrong, and what is looked at

    def _kill(self, every: float, server_at: float) -> None:
        killed_server = False
        while not self._ended.wait(every):
            workers = self._workers()
            if workers:
                try:
                    os.kill(random.choice(workers), signal.SIGKILL)
                    self.counts["kills of a process that computes"] += 1
                except OSError:
                    pass
            if not killed_server and time.monotonic() > server_at:
                killed_server = True
                self.server.kill()
                self.server.start()
                self.counts["kills of the server"] += 1

    def _workers(self) -> list[int]:
        try:
            return self.server.workers()
        except OSError:
            return []

    def _look(self) -> None:
        begun = time.monotonic()
        while not self._ended.wait(SAMPLED):
            used = 0
            for process in (self.server.process.pid, *self._workers()):
                try:
                    used += psutil.Process(process).memory_info().rss
                except psutil.Error:
                    continue
            self.samples.append((time.monotonic() - begun, used))
            if used > self.budget:
                self.counts["looks beyond the budget"] += 1

    def report(self) -> dict[str, Any]:
        used = [size for _, size in self.samples]
        server = self._median_of
        most = max(used)
        if most > self.budget:
            self.wrong.append(f"{most} bytes were used of {self.budget}")
        within = [ratio for ratio in self.ratios if 1.0 <= ratio <= 1.05]
        return {
            **self.found,
            "seconds": round(self.samples[-1][0]),
            "counts": dict(sorted(self.counts.items())),
            "budget": self.budget,
            "most_bytes": most,
            "median_bytes_by_quarter": server(),
            "planned_over_measured": _spread(self.ratios),
            "planned_within_5_percent": round(len(within) / max(1, len(self.ratios)), 3),
            "wrong": self.wrong,
        }

    def _median_of(self) -> list[int]:
        quarter = max(1, len(self.samples) // 4)
        sizes = [size for _, size in self.samples]
        return [int(statistics.median(sizes[k * quarter : (k + 1) * quarter] or [0])) for k in range(4)]


def _spread(values: list[float]) -> dict[str, float]:
    take: dict[str, Callable[[list[float]], float]] = {"least": min, "median": statistics.median, "most": max}
    return {name: round(fn(values), 4) for name, fn in take.items()} if values else {}


if __name__ == "__main__":
    sys.exit(main())
