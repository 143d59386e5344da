"""What no plan can keep up with, done to a guest's networks: told by name, with what to do in its place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from lowtide.guests.moving_hooks import check_moved_by_none
from lowtide.memory.overrides import Overrides, is_override

_TILES = (
    "the plan says how to decode, row by row where that is needed, without seams. A plan may choose tiles with "
    "lowtide.fit(pipe, allow=('blended_tiling',), ...)"
)
_OFFLOAD = "the plan says where weights rest. Give another one with lowtide.fit(pipe, ...)"
_CASTING = "the plan says what weights rest in. It may choose 8 bits with lowtide.fit(pipe, allow=('fp8',), ...)"
REFUSED: dict[str, str] = {
    "enable_tiling": _TILES,
    "enable_group_offload": _OFFLOAD,
    "enable_layerwise_casting": _CASTING,
}
"""Methods of networks that are refused within a budget, and why."""


class RefusedMethods:
    """Has networks refuse the methods of `REFUSED`, until `put_back`. Their copies do not, and none is kept alive."""

    def __init__(self) -> None:
        self._networks: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def put_on(self, networks: Mapping[str, nn.Module]) -> None:
        """Have these networks refuse, as far as they do not yet."""
        for name, network in networks.items():
            self._networks.add(network)
            for method in REFUSED:
                if method not in network.__dict__ and callable(getattr(network, method, None)):
                    Overrides().set(network, method, _refusing(network, name, method))

    def put_back(self) -> None:
        """Have all of them as they were."""
        for network in list(self._networks):
            for method in REFUSED:
                if is_override(network.__dict__.get(method)):
                    del network.__dict__[method]
        self._networks.clear()


def _refusing(network: nn.Module, name: str, method: str) -> Callable[..., Any]:
    within = weakref.ref(network)

    def refuse(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if network is not within():  # a copy
            return getattr(type(network), method)(network, *args, **kwargs)
        raise RuntimeError(refusal(name, method))

    refuse.__name__ = method
    return MethodType(refuse, network)


def refusal(name: str, method: str) -> str:
    """Why a network called so may not have such a method called."""
    return f"{name}.{method} and a budget are not possible together: {REFUSED[method]}; or call lowtide.unfit(pipe)."


def check_can_be_planned(networks: Mapping[str, nn.Module]) -> None:
    """Raise `ValueError`, saying what to do, for networks that cannot be under a plan as they are now."""
    for name, network in networks.items():
        _check_not_compiled(name, network)
        check_moved_by_none(name, network)


def _check_not_compiled(name: str, network: Any) -> None:
    if isinstance(getattr(network, "_orig_mod", None), nn.Module):
        raise ValueError(
            f"{name} is compiled (torch.compile), which freezes how its parts are called, and a plan brings weights to "
            f"them: give the pipeline the network itself first, pipe.{name} = pipe.{name}._orig_mod."
        )
