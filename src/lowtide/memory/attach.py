"""Attach a rule to a module and detach it: the one place that changes how a module is called.

Each unit's modules get a `_call_impl` of their own (what `Module.__call__` runs), so that weights come before every
hook of others and leave after them, also when a call ends by an exception that PyTorch's hooks do not see, such as
KeyboardInterrupt. The root gets brackets around its call and its other entry points. Three more methods set the plan
aside while they run: `_apply` (which is `.to`, `.half` and so on), `load_state_dict`, and `__getstate__` (copies and
pickles get ordinary modules).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowtide.calls import Call, Calls
from lowtide.memory.blocks import split
from lowtide.memory.copy_out import out_of_buffers
from lowtide.memory.inputs import on_device
from lowtide.memory.module_weights import gather, refill, refill_left
from lowtide.memory.no_tracing import Uncompiled, refuse_tracing
from lowtide.memory.order import Order
from lowtide.memory.overrides import Overrides
from lowtide.memory.placeholder import AtRest
from lowtide.memory.rule import Level, Rule
from lowtide.memory.settling import settle_rests
from lowtide.memory.stream import Stream
from lowtide.memory.unit import Unit
from lowtide.memory.weight import Weight, following_in, has_moved, moves
from lowtide.weights.index import CheckpointIndex
from lowtide.weights.slots import emptied, slots

_FOREIGN = ("generate", "get_text_features", "get_image_features")
ENTRY_POINTS = ("encode", "decode", "decode_rows", "decode_frames", *_FOREIGN)
"""Methods besides `forward` by which a module may be called as a whole."""

_MARK = "_lowtide_attachment"  # on the root
_KEEPER = "_lowtide_keeper"  # on every module inside


class Attachment:
    """A rule at work on one module. `units` in registered order; `stream` says what is loaded and what that took."""

    def __init__(self, root: nn.Module, rule: Rule, stream: Stream, exclude_kwargs: Collection[str] = ()) -> None:
        self.root = root
        self.rule = rule
        self.stream = stream
        self.exclude_kwargs = frozenset(exclude_kwargs)
        self.units: list[Unit] = []
        self.order: Order[Unit] = Order()
        self.weights: list[Weight] = []
        self._overrides = Overrides(_KEEPER, _MARK)
        self._calls: Calls[Call] = Calls()
        self._is_settled = True
        self.is_at_work = False

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return self.stream.device

    @property
    def bound(self) -> int:
        """Weight bytes on the device that are never exceeded, from the sizes of the weights alone."""
        return self.stream.bound

    # ---- coming and going

    def take(self, weights: list[Weight], index: CheckpointIndex | None) -> None:
        """Take over the weights: each rests as the rule says, and its slots hold placeholders."""
        self.weights = weights
        for weight in weights:
            weight.device = self.device
            weight.ledger = self.stream.ledger
        kind = type(self.root).__name__
        parts = split(self.root, weights, self.rule)
        self.units = [Unit(f"{kind}.{part.weights[0].name}", part) for part in parts]
        settle_rests(self.units, self.rule, self.device, index)
        self.stream.admit(self.units)
        for unit in self.units:
            unit.lingers = self.rule.level is Level.WHOLE
            if unit.stays:
                self.stream.fetch(unit)
                self.stream.keep(unit)
        self._override()

    def let_go(self) -> None:
        """Leave placeholders in every slot and the module as it was otherwise; the weights keep their resting place."""
        self.is_at_work = False
        self._overrides.put_back()
        self.stream.dismiss(self.units)
        self.units, self.order = [], Order()
        for weight in self.weights:
            weight.disown_replaced()
            weight.leave_placeholders()
        self.weights = [weight for weight in self.weights if weight.views]

    def restore(self, *, to_given: bool) -> None:
        """After `let_go`: put ordinary tensors into the slots."""
        for weight in self.weights:
            weight.restore(to_given=to_given)
        self.weights = []

    def hand_over(self) -> None:
        """As `let_go`, for another rule that takes the weights from their slots: this one keeps nothing of them."""
        self.let_go()
        self.weights = []

    @property
    def is_running(self) -> bool:
        """Whether the module is being called."""
        return bool(self._calls)

    # ---- while it runs

    @property
    def _whole(self) -> list[Unit]:
        """The units that are needed around every call of the whole module."""
        return self.units if self.rule.level is Level.WHOLE else []

    @contextmanager
    def running(self) -> Generator[None]:
        """Bracket a call of the whole module; one thread at a time. Afterwards every weight is at rest again."""
        this, ended_well = Call(), False
        with self.stream.lock:
            whole = self._whole
            try:
                self._begin(this)
                for unit in whole:
                    self.stream.enter(unit)
                yield
                ended_well = True
            finally:
                self._calls.end(this)
                for unit in whole:
                    self.stream.leave(unit, self.root, may_wait=True)
                if not self._calls:
                    self._settle(ended_well=ended_well)

    def _begin(self, call: Call) -> None:
        if not self._calls and not self._is_settled:  # an interrupt, or a fork, came into the end of a call
            self._settle(ended_well=False)
        self._is_settled = False
        self._calls.begin(call)

    def _settle(self, *, ended_well: bool) -> None:
        if ended_well:
            self.order.finished()
        else:
            self.order.abandoned()
            self.stream.abandon(self.units)
        self.stream.settle(self.units)
        self._is_settled = True

    def enter(self, unit: Unit) -> None:
        """A call that needs `unit` begins."""
        self.stream.enter(unit)
        if self._calls.under_way and self.stream.looks_ahead and not unit.stays and not unit.aside:
            if unit.count == 1:
                self.order.entered(unit)
            self.stream.look_ahead(self.order.upcoming(self.rule.prefetch))

    # ---- the overrides

    def _override(self) -> None:
        self._overrides.mark(self.root, _MARK, self)
        by_module: dict[nn.Module, list[Unit]] = {}
        if self.rule.level is not Level.WHOLE:
            for unit in self.units:
                for module in () if unit.stays else unit.modules:
                    by_module.setdefault(module, []).append(unit)
        for module, units in by_module.items():
            if module is not self.root:
                self._overrides.set(module, "_call_impl", self._around(module, module._call_impl, units))
        call = self._around(self.root, self.root._call_impl, by_module.get(self.root, []))
        self._overrides.set(self.root, "_call_impl", self._bracketed(call))
        for name in ENTRY_POINTS:
            method = getattr(self.root, name, None)
            if callable(method) and not isinstance(method, nn.Module):
                self._overrides.set(self.root, name, self._bracketed(method))
        for module in self.root.modules():
            for name in ("_apply", "load_state_dict"):
                self._overrides.set(module, name, self._set_aside(module, name))
            self._overrides.set_state(module)
            self._overrides.mark(module, _KEEPER, self)
        self.is_at_work = True

    def _around(self, module: nn.Module, call: Callable[..., Any], units: list[Unit]) -> Callable[..., Any]:
        enter, leave, under_way = Uncompiled(self.enter), Uncompiled(self.stream.leave), self._calls.under_way

        def entered_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(module)
            begun: list[Unit] = []
            try:
                for unit in units:
                    begun.append(unit)
                    enter(unit)
                return out_of_buffers(call(*args, **kwargs), begun)
            finally:
                for unit in reversed(begun):
                    leave(unit, module, may_wait=bool(under_way))

        return entered_call if units else call

    def _bracketed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def bracketed_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(self.root)
            with self.running():
                args, kwargs = on_device(self.device, args, kwargs, self.exclude_kwargs)
                return out_of_buffers(method(*args, **kwargs), self._whole)

        return bracketed_call

    def _set_aside(self, module: nn.Module, name: str) -> Callable[..., Any]:
        method = getattr(module, name)

        @functools.wraps(method)
        def plain_call(*args: Any, **kwargs: Any) -> Any:
            if self.is_running:
                raise RuntimeError(f"{name} is not possible while {type(self.root).__name__} is being called.")
            try:
                return self._changed(module, name, args, kwargs)
            except BaseException:
                refill_left(self.root, _KEEPER)  # an interrupt may have come before the rule was back
                raise

        return plain_call

    def _changed(self, module: nn.Module, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        is_moved = name == "_apply" and moves(args[0], self.device)
        try:
            self.let_go()
            following = following_in(self.weights, module) if name == "_apply" and not is_moved else []
            self.weights = [weight for weight in self.weights if weight not in following]
            self.restore(to_given=False)
            with emptied(view.slot for weight in following for view in weight.views):
                result = getattr(module, name)(*args, **kwargs)
            for weight in following:
                weight.follow(args[0])
            return result
        finally:
            if not is_moved and not has_moved(self.root, self.device):
                attach(self.root, self.rule, self.stream, exclude_kwargs=self.exclude_kwargs)
            elif module is not self.root:
                _warn_undone(self.root, f"a part of it ({type(module).__name__}) was moved")


def attach(
    root: nn.Module,
    rule: Rule,
    stream: Stream,
    *,
    index: CheckpointIndex | None = None,
    exclude_kwargs: Collection[str] = (),
) -> Attachment:
    """Put `root` under `rule`. Rules that were at work on it, on its parts or on a module around it end.

    `index` is needed for weights on meta. Raises `ValueError` for modules that cannot be moved as bytes, `OSError` and
    `CheckpointError` if files cannot be read or written; the module is as it was before then, without a rule.
    """
    compiled = next((name for name, part in root.named_modules() if part._compiled_call_impl is not None), None)
    if compiled is not None:
        part = f"{compiled!r} of {type(root).__name__}" if compiled else type(root).__name__
        raise ValueError(f"{part} is compiled, which freezes how its parts are called. Offload it first.")
    gather(slots(root))  # raises what it raises before anything is changed
    for other in _inside(root):
        _check_idle(other)
    attachment = Attachment(root, rule, stream, exclude_kwargs)
    try:
        _free_from_others(root)
        attachment.take(gather(slots(root)), index)
    except BaseException:
        for begun in (attachment, *_inside(root)):
            begun.hand_over()
        refill(slot for slot in slots(root) if isinstance(slot.tensor, AtRest))
        raise
    return attachment


def detach(module: nn.Module) -> None:
    """Undo the offload of `module` and its parts, if any: weights go to their first devices, from meta to the host.

    Raises `RuntimeError` while the module is being called.
    """
    for attachment in _inside(module):
        _check_idle(attachment)
        attachment.let_go()
        attachment.restore(to_given=True)
    refill_left(module, _KEEPER)


@contextmanager
def set_aside(module: nn.Module) -> Generator[bool]:
    """End all rules on `module`, its parts and what is around it; attach them again after the `with` block.

    Yields whether a rule was at work on the whole module; its weights may be left at rest then. Raises `RuntimeError`
    while one of the modules is being called.
    """
    keepers = (keeper for inner in module.modules() if (keeper := inner.__dict__.get(_KEEPER)) is not None)
    attachments = list(dict.fromkeys([*keepers, *_inside(module)]))
    for attachment in attachments:
        _check_idle(attachment)
    try:
        for attachment in attachments:
            attachment.hand_over()
        yield any(module in set(attachment.root.modules()) for attachment in attachments)
    finally:
        for attachment in attachments:
            attach(attachment.root, attachment.rule, attachment.stream, exclude_kwargs=attachment.exclude_kwargs)


def attachment_of(module: nn.Module) -> Attachment | None:
    """The rule at work on `module`, if there is one."""
    mark = module.__dict__.get(_MARK)
    return mark if mark is not None and mark.is_at_work else None


def _inside(module: nn.Module) -> list[Attachment]:
    """Those on a module and its parts, also one whose coming or going was cut short."""
    return [mark for inner in module.modules() if (mark := inner.__dict__.get(_MARK)) is not None]


def _free_from_others(root: nn.Module) -> None:
    """End other rules on `root`: rules on it and its parts hand their weights over, a rule around it is undone."""
    for attachment in _inside(root):
        attachment.hand_over()
    others = {keeper for inner in root.modules() if (keeper := inner.__dict__.get(_KEEPER)) is not None}
    for attachment in others:
        _warn_undone(attachment.root, f"a part of it ({type(root).__name__}, or a part of that) gets its own")
        detach(attachment.root)


def _warn_undone(root: nn.Module, reason: str) -> None:
    warnings.warn(f"The offload of {type(root).__name__} is undone, since {reason}.", stacklevel=5)


def _check_idle(attachment: Attachment) -> None:
    if attachment.is_running:
        raise RuntimeError(
            f"{type(attachment.root).__name__} is being called, so its offload cannot be changed now. Wait for the end."
        )
