"""Open weight files: which tensor is where in which file, windows of mapped pages, and files without a name."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.safetensors_at import save_at

from lowtide.weights import provenance
from lowtide.weights.files import Mapping, SpillFile, WeightFile, read
from lowtide.weights.fill import load_tensors
from lowtide.weights.index import CheckpointError, read_index
from lowtide.weights.provenance import origin_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_at(0, {"a": torch.randn(100, 50), "b": torch.randn(8), "c": torch.randn(3000)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_a_loaded_tensor_knows_its_place_until_it_is_changed(file: Path) -> None:
    index = read_index(file)
    tensors = load_tensors(index)
    for name, tensor in tensors.items():
        origin = origin_of(tensor)
        assert origin is not None
        assert (origin.offset, origin.nbytes) == (index[name].offset, index[name].nbytes)
        again = torch.empty(tensor.numel(), dtype=tensor.dtype)
        read(origin, again)
        assert torch.equal(again.view(tensor.shape), tensor)
    assert origin_of(tensors["a"].clone()) is None
    assert origin_of(tensors["a"].T) is None
    part = origin_of(tensors["c"][10:20])
    assert part is not None
    assert part.offset == index["c"].offset + 40
    tensors["b"].data[3] += 1
    assert origin_of(tensors["b"]) is None
    assert origin_of(tensors["a"]) is not None, "a neighbour on the same page was written, not this one"


def test_a_converted_parameter_knows_its_place_until_it_is_changed(file: Path) -> None:
    from lowtide.weights.fill import fill

    module = torch.nn.Module()
    for name, shape in {"a": (100, 50), "b": (8,), "c": (3000,)}.items():
        module.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device="meta")))
    fill(module, read_index(file), dtype=torch.bfloat16)
    origin = origin_of(module.a)
    assert origin is not None
    assert origin.dtype == torch.float32
    module.a.data[0, 0] += 1
    assert origin_of(module.a) is None


def test_changed_files_are_refused(file: Path) -> None:
    weights = WeightFile(file)
    weights.check()
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="shorter"):
        weights.check()
    with pytest.raises(CheckpointError, match="shorter"):
        weights.read_into(memoryview(bytearray(10)), 0)


def test_a_removed_file_is_still_read(file: Path) -> None:
    content = file.read_bytes()
    weights = WeightFile(file)
    file.unlink()
    target = bytearray(len(content))
    weights.read_into(memoryview(target), 0)
    assert bytes(target) == content


def test_a_spill_leaves_no_file(tmp_path: Path) -> None:
    spill = SpillFile(tmp_path)
    parts = [torch.arange(count, dtype=torch.uint8) for count in (1, 200, 255)]
    origins = [spill.append(part) for part in parts]
    assert all(origin.offset % 256 == 0 for origin in origins)
    for origin, part in zip(origins, parts, strict=True):
        again = torch.empty_like(part)
        read(origin, again)
        assert torch.equal(again, part)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_files_are_closed_with_their_last_user(file: Path, tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        tensors = load_tensors(read_index(file))
        spill = SpillFile(tmp_path)
        origin = spill.append(torch.zeros(10, dtype=torch.uint8))
        assert len(os.listdir("/proc/self/fd")) > before
        del tensors, spill, origin
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_that_load_map_and_drop(file: Path) -> None:
    """Four threads for a moment, which change places as often as Python can."""
    index, until, faults = read_index(file), time.monotonic() + 2, []
    expected = {name: tensor.clone() for name, tensor in load_tensors(index).items()}
    held = [WeightFile(file).mapping() for _ in range(200)]

    def work() -> None:
        try:
            while time.monotonic() < until:
                tensors = load_tensors(index)
                assert all(origin_of(tensor) is not None for tensor in tensors.values())
                assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
                mapped = [WeightFile(file).mapping() for _ in range(5)]
                assert all(provenance._mappings.holding(one.address) == (one, 0) for one in mapped)
        except BaseException as fault:
            faults.append(fault)

    run_threads(work)
    assert faults == []
    assert len(held) == 200


def test_threads_that_map_one_file_get_one_mapping(file: Path) -> None:
    for _ in range(50):
        weights, mapped, start = WeightFile(file), [], threading.Barrier(4)

        def work(weights: WeightFile = weights, mapped: list[Mapping] = mapped, start: Any = start) -> None:
            start.wait()
            mapped.append(weights.mapping())

        run_threads(work)
        assert len({id(one) for one in mapped}) == 1


def run_threads(work: Callable[[], None]) -> None:
    """Four of them, to their end."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
