"""The networks of a foreign pipeline, those of the pipelines inside it among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks by name; one that has several names has the first of them."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for prefix, owner in pipelines_in(pipe):
        for name, part in components_of(owner).items():
            if isinstance(part, nn.Module):
                found.setdefault(id(part), (prefix + name, part))
    return dict(found.values())


def components_of(pipe: Any) -> dict[str, Any]:
    """The components of one pipeline by name, as they are now."""
    components = pipe.components
    return {name: getattr(pipe, name, part) for name, part in components.items()}


def pipelines_in(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The pipeline itself and those that it holds and calls, each with what its components' names begin with."""
    yield "", pipe
    for name, part in vars(pipe).items():
        if is_pipeline(part):
            yield f"{name}.", part


def is_pipeline(thing: Any) -> bool:
    """Whether something has components by name and can be called, and is no network itself."""
    if isinstance(thing, (nn.Module, type)) or not callable(thing):
        return False
    return isinstance(getattr(thing, "components", None), Mapping)
