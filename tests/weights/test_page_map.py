"""The pages of a mapped file: brought in, let go, and whether they were written to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowtide.weights.files import WeightFile
from lowtide.weights.page_map import bring_in, is_untouched, let_go


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(20_000, dtype=torch.float32).numpy().tobytes())
    return path


def test_writes_stay_private_and_windows_come_back_as_they_were(file: Path) -> None:
    before = file.read_bytes()
    weights = WeightFile(file)
    window = torch.frombuffer(weights.mapping("window"), dtype=torch.uint8)
    content = window.clone()
    window[5000:9000] = 7
    assert file.read_bytes() == before
    assert not torch.equal(window, content)
    let_go(window.data_ptr(), window.numel(), edges=True)
    assert torch.equal(window, content)
    bring_in(window.data_ptr(), window.numel())
    assert torch.equal(window, content)


def test_pages_at_the_edges_are_dropped_only_when_asked(file: Path) -> None:
    window = torch.frombuffer(WeightFile(file).mapping("window"), dtype=torch.uint8)
    window[:100] = 7
    let_go(window.data_ptr() + 100, 300)
    assert bool((window[:100] == 7).all())
    let_go(window.data_ptr() + 100, 300, edges=True)
    assert not bool((window[:100] == 7).all())


def test_a_page_that_was_written_to_is_known_by_itself(file: Path) -> None:
    window = torch.frombuffer(WeightFile(file).mapping("window"), dtype=torch.uint8)
    first, far = window.data_ptr(), window.data_ptr() + 40_000
    window.sum()
    assert is_untouched(first, window.numel())
    window[100] = 7
    assert not is_untouched(first + 100, 1)
    assert is_untouched(far, 1000)


def test_where_the_system_does_not_say_pages_count_as_written_to(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = torch.frombuffer(WeightFile(file).mapping("window"), dtype=torch.uint8)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr("builtins.open", refuse)
    assert not is_untouched(window.data_ptr(), 1000)
