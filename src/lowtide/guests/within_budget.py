"""What a foreign pipeline does otherwise while it is within a budget: a class for that one object, its own below it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from lowtide.casting.cast_module import is_cast
from lowtide.forks import new_lock
from lowtide.guests.ghost import as_subclass
from lowtide.guests.guest import Guest

KEY = "_lowtide_guest"
OFFLOADS = (
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "enable_group_offload",
    "reset_device_map",
)
CHANGING = (
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "delete_adapters",
    "load_ip_adapter",
    "unload_ip_adapter",
    "load_textual_inversion",
    "unload_textual_inversion",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
)
"""Methods that change networks: the plan is put aside for them, and made anew for the next call."""
_guests: set[weakref.ref[Guest]] = set()
"""Those of pipelines that are within a budget, or are being put there, by whichever thread."""
_guests_lock = new_lock()


def guest_of(pipe: Any) -> Guest | None:
    """The guest that a pipeline is within a budget; None where it is not."""
    guest = getattr(pipe, "__dict__", {}).get(KEY)
    return guest if guest is not None and guest.pipe is pipe else None


def guest_begun(pipe: Any) -> Guest | None:
    """The guest by which some thread puts a pipeline within a budget, or has done so; None where there is none."""
    guests = (reference() for reference in list(_guests))
    return next((guest for guest in guests if guest is not None and guest.pipe is pipe), None)


def guest_to_be(pipe: Any) -> Guest:
    """The one guest by which a pipeline is put within a budget, whichever threads do so."""
    with _guests_lock:
        guest = guest_begun(pipe)
        if guest is None:
            guest = Guest(pipe)
            _guests.add(weakref.ref(guest, _guests.discard))
        return guest


def put_within(guest: Guest) -> None:
    """Have a pipeline go through its guest."""
    pipe = guest.pipe
    guest.refused.put_on(guest.modules())
    if guest_of(pipe) is guest:
        return
    guest.own_class = own = type(pipe)  # which may be another since it was within a budget before
    members: dict[str, Any] = {name: _refused(name, own) for name in OFFLOADS if hasattr(own, name)}
    members |= {name: _put_aside(name, own) for name in CHANGING if hasattr(own, name)}
    if hasattr(own, "save_pretrained"):
        members["save_pretrained"] = _saved(own)
    members |= {"__call__": _called(own), "to": _moved(own), "__reduce_ex__": _plain_copy}
    members |= {name: property(_device(name, own)) for name in ("device", "_execution_device") if hasattr(own, name)}
    pipe.__dict__[KEY] = guest
    pipe.__class__ = as_subclass(own, **members)


def take_out(guest: Guest) -> None:
    """Have a pipeline as it was."""
    guest.refused.put_back()
    if guest_of(guest.pipe) is guest:
        guest.pipe.__class__ = guest.own_class
        del guest.pipe.__dict__[KEY]


def _called(own: type[Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        guest = guest_of(self)
        return own.__call__(self, *args, **kwargs) if guest is None else guest.call(args, kwargs)

    call.__wrapped__ = own.__call__  # type: ignore[attr-defined]
    call.__doc__ = own.__call__.__doc__
    return call


def _device(name: str, own: type[Any]) -> Callable[[Any], torch.device]:
    plain = getattr(own, name)

    def device(self: Any) -> torch.device:
        guest = guest_of(self)
        chosen = None if guest is None else guest.device
        return plain.__get__(self) if chosen is None else chosen

    return device


def _moved(own: type[Any]) -> Callable[..., Any]:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        guest = guest_of(self)
        if guest is None:  # taken out by another thread
            return own.to(self, *args, **kwargs)
        asked = {str(value) for value in (*args, *kwargs.values()) if value is not None}
        device = guest.device
        if device is not None and asked <= {str(device), device.type}:
            return self
        raise RuntimeError(
            f"{type(self).__name__} is within a budget, which says where its weights are and in which dtype: call "
            "lowtide.unfit(pipe) first."
        )

    return to


def _refused(name: str, own: type[Any]) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if guest_of(self) is None:  # taken out by another thread
            return getattr(own, name)(self, *args, **kwargs)
        raise RuntimeError(
            f"{type(self).__name__}.{name} and a budget are not possible together: the plan says where weights rest. "
            "Give another budget with lowtide.fit(pipe, ...), or call lowtide.unfit(pipe) first."
        )

    return refuse


def _put_aside(name: str, own: type[Any]) -> Callable[..., Any]:
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        guest = guest_of(self)
        if guest is None:  # taken out by another thread
            return getattr(own, name)(self, *args, **kwargs)
        with guest.call_lock.between_calls("its networks"):
            if guest.applied is not None:
                guest.applied.undo()
            return getattr(own, name)(self, *args, **kwargs)

    return changed


def _saved(own: type[Any]) -> Callable[..., Any]:
    """Weights that rest in 8 bits are saved as they were before."""

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        guest = guest_of(self)
        if guest is None:  # taken out by another thread
            return own.save_pretrained(self, *args, **kwargs)
        with guest.call_lock.alone():
            if guest.applied is not None and any(map(is_cast, guest.modules().values())):
                with guest.call_lock.between_calls("its networks"):
                    guest.applied.undo()
            return own.save_pretrained(self, *args, **kwargs)

    return save


def _plain_copy(self: Any, protocol: Any) -> Any:
    """Copies and pickles are pipelines without a budget."""
    own = type(self).__mro__[1]
    state = {name: value for name, value in self.__dict__.items() if name != KEY}
    return _made_again, (own, state)


def _made_again(own: type[Any], state: dict[str, Any]) -> Any:
    pipe = object.__new__(own)
    pipe.__dict__.update(state)
    return pipe
