"""What is traced of a pipeline is kept for others that are alike, in this process: for tests of what plans do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lowtide.fitting.meta_subject import MetaSubject, _settings
from lowtide.guests.driven_guest import DrivenGuest
from lowtide.guests.guest import Guest
from lowtide.pipelines.base import DiffusionPipeline
from lowtide.weights.slots import slots

_KEPT: dict[Any, Any] = {}
_TRACES = {kind: kind._trace for kind in (MetaSubject, DrivenGuest)}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines that are made anew, and differ in nothing that a trace depends on, are traced once.

    Hooks on the networks of guests are not looked at.
    """
    for kind in _TRACES:
        monkeypatch.setattr(kind, "_trace", _kept)


def _kept(meta: MetaSubject, size: Any, other_ways: Any) -> Any:
    trace = _TRACES[type(meta)]
    if not isinstance(meta.subject, DiffusionPipeline | Guest):
        return trace(meta, size, other_ways)
    asked = size._key if isinstance(meta.subject, Guest) else replace(size, steps=1)
    key = repr((tuple(_likeness(meta)), asked, tuple(other_ways)))
    if key not in _KEPT:
        _KEPT[key] = trace(meta, size, other_ways)
    components, stages = _KEPT[key]
    return dict(components), stages


def _likeness(meta: MetaSubject) -> Iterator[Any]:
    """All that is set on a subject and its networks, their shapes, and the code that they go through."""
    subject = meta.subject
    pipe = subject.pipe if isinstance(subject, Guest) else subject
    scheduler = getattr(subject.scheduler, "_scheduler", subject.scheduler)
    yield type(pipe), meta.device, subject.dtype, meta.in_files
    yield (
        type(scheduler),
        getattr(scheduler, "config", None),
        sorted((name, str(value)) for name, value in vars(pipe).items() if _is_setting(name, value)),
    )
    for name, network in subject.modules().items():
        yield name, str(getattr(network, "config", None)), [list(_settings(part)) for part in network.modules()]
        yield [(type(part), part.forward.__qualname__) for part in network.modules()]
        yield [
            (slot.name, slot.kind, slot.tensor.shape, slot.tensor.stride(), slot.tensor.dtype)
            for slot in slots(network)
        ]


def _is_setting(name: str, value: object) -> bool:
    """Not what the last call left."""
    return not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple, type(None)))
