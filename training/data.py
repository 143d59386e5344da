"""The training pictures, rendered once by several processes and kept in a memory-mapped file."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from training.seascapes import dataset

CHUNK = 500


def load_or_render(folder: Path, count: int, seed: int, workers: int) -> tuple[np.ndarray, list[str]]:
    """Pictures uint8 `[count, 128, 128, 3]` (memory-mapped) and their captions; rendered by the first call."""
    pictures, captions = folder / f"pictures-{count}-{seed}.npy", folder / f"captions-{count}-{seed}.json"
    if not captions.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _render(pictures, captions, count, seed, workers)
    return np.load(pictures, mmap_mode="r"), json.loads(captions.read_text())


def _render(pictures: Path, captions: Path, count: int, seed: int, workers: int) -> None:
    out = open_memmap(pictures, mode="w+", dtype=np.uint8, shape=(count, 128, 128, 3))
    said: list[str] = []
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(workers) as pool:
        for start, (images, texts) in zip(starts, pool.map(partial(_chunk, count, seed), starts), strict=True):
            out[start : start + len(images)] = images
            said += texts
            print(f"rendered {len(said)} of {count}", flush=True)
    out.flush()
    captions.write_text(json.dumps(said))


def _chunk(count: int, seed: int, start: int) -> tuple[np.ndarray, list[str]]:
    return dataset(min(CHUNK, count - start), seed=seed, start=start)
