"""A trace for a plan that is cut short, by Ctrl-C or in a forked child, leaves the next one as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests import tiny
from tests.fitting import fits
from tests.forked import Parked, in_child
from tests.lines import Place, interrupted, places

from lowtide.fitting.meta_subject import MetaSubject, meta_subject
from lowtide.planning.run_size import RunSize
from lowtide.planning.workload import Workload

SIZE, OTHER = RunSize(16, 16, steps=1), RunSize(8, 8, steps=1)
SOURCES = ("self.set(WHOLE)", "module.__dict__.pop(name, None)", "overrides.set(module, ")
"""Of lines at which the subject on meta is not as it is between traces."""


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return fits.small(tmp_path_factory.mktemp("pipe"), vae=tiny.vae(block_out_channels=[8, 8], **levels))


@pytest.fixture(scope="module")
def expected(pipe: Any) -> Workload:
    return on_meta(pipe).workload(SIZE)


def on_meta(pipe: Any) -> MetaSubject:
    return meta_subject(pipe, torch.device("cpu"))


def lines(pipe: Any) -> Iterator[Place]:
    meta = on_meta(pipe)
    every = places(lambda: meta.workload(OTHER), ("pipelines/decode_ways", "prediction/tracing", "memory/overrides"))
    for source in SOURCES:
        yield next(place for place in every if place.source.startswith(source))


def test_by_an_interrupt(pipe: Any, expected: Workload) -> None:
    for place in lines(pipe):
        meta = on_meta(pipe)
        assert interrupted(lambda meta=meta: meta.workload(OTHER), place), str(place)
        assert meta.workload(SIZE) == expected, str(place)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_child(pipe: Any, expected: Workload) -> None:
    for place in lines(pipe):
        meta = on_meta(pipe)
        with Parked(lambda meta=meta: meta.workload(OTHER), place) as parked:
            assert parked.has_come, str(place)
            assert in_child(lambda meta=meta: torch.tensor(meta.workload(SIZE) == expected)), str(place)


def test_a_size_that_is_not_possible_costs_no_copy(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = on_meta(pipe)
    before = meta.subject
    monkeypatch.setattr(MetaSubject, "_trace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        meta.workload(SIZE)
    monkeypatch.undo()
    meta.workload(SIZE)
    assert meta.subject is before
