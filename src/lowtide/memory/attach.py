"""Attach a rule to a module and detach it: the one place that changes how a module is called.

Each unit's modules get a `_call_impl` of their own (what `Module.__call__` runs), so that weights come before every
hook of others and leave after them, also when a call ends by an exception that PyTorch's hooks do not see, such as
KeyboardInterrupt. The root gets brackets around its call and its other entry points. Two more methods set the plan
aside while they run: `_apply` (which is `.to`, `.half` and so on) and `load_state_dict`. All of these, and
`state_dict`, wait for other threads. `__getstate__` gives copies and pickles ordinary modules.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Generator, Iterable
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
from lowtide.memory.placeholder import AtRest
from lowtide.memory.rule import Level, Rule
from lowtide.memory.rule_changes import KEEPER, Claim, attachment_of, changing
from lowtide.memory.settling import settle_rests
from lowtide.memory.stream import Stream
from lowtide.memory.unit import Unit
from lowtide.memory.weight import Weight, following_in, has_moved, moves
from lowtide.weights.index import CheckpointIndex
from lowtide.weights.slots import emptied, slots

_FOREIGN = ("generate", "get_text_features", "get_image_features")
ENTRY_POINTS = ("encode", "decode", "decode_rows", "decode_frames", *_FOREIGN)
"""Methods besides `forward` by which a module may be called as a whole."""


class Attachment(Claim):
    """A rule at work on one module. `units` in registered order; `stream` says what is loaded and what that took."""

    def __init__(self, root: nn.Module, rule: Rule, stream: Stream, exclude_kwargs: Collection[str] = ()) -> None:
        super().__init__(root, stream)
        self.rule = rule
        self.exclude_kwargs = frozenset(exclude_kwargs)
        self.units: list[Unit] = []
        self.order: Order[Unit] = Order()
        self.weights: list[Weight] = []
        self._calls: Calls[Call] = Calls()
        self._is_settled = True

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
            unit.lingers = unit.recurs or self.rule.level is Level.WHOLE
            if unit.stays:
                self.stream.fetch(unit)
                self.stream.keep(unit)
        self._override()

    def let_go(self) -> None:
        """Leave placeholders in every slot; the weights keep their resting place. Calls wait, or go by placeholders."""
        self.is_at_work = False
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

    @contextmanager
    def running(self, units: Iterable[Unit]) -> Generator[list[Unit]]:
        """Bracket a call of the whole module, all of which needs `units`; yields them. Hold the stream's lock.

        Afterwards every weight is at rest again.
        """
        this, begun, ended_well = Call(), list[Unit](), False
        enter = self.stream.enter if self.rule.level is Level.WHOLE else self.enter
        try:
            self._begin(this)
            for unit in units:
                begun.append(unit)
                enter(unit)
            yield begun
            ended_well = True
        finally:
            self._calls.end(this)
            for unit in reversed(begun):
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
            self.stream.look_ahead(self.order.upcoming(self.rule.reach))

    # ---- the overrides

    def _override(self) -> None:
        by_module: dict[nn.Module, list[Unit]] = {}
        if self.rule.level is not Level.WHOLE:
            for unit in self.units:
                for module in () if unit.stays else unit.modules:
                    by_module.setdefault(module, []).append(unit)
        whole = self.units if self.rule.level is Level.WHOLE else []
        self._bracket("_call_impl", whole or by_module.pop(self.root, []))
        for module, units in by_module.items():
            self.overrides.set(module, "_call_impl", self._around(module, units))
        for name in ENTRY_POINTS:
            method = getattr(self.root, name, None)
            if callable(method) and not isinstance(method, nn.Module):
                self._bracket(name, whole)
        for module in self.root.modules():
            for name in ("_apply", "load_state_dict"):
                self.overrides.set(module, name, self._set_aside(module, name))
            self.overrides.set(module, "state_dict", self._in_turn(module, "state_dict"))
            self.overrides.set_state(module)
        self.is_at_work = True
        self.overrides.undo_others()

    def _around(self, module: nn.Module, units: list[Unit]) -> Callable[..., Any]:
        enter, leave, under_way = Uncompiled(self.enter), Uncompiled(self.stream.leave), self._calls.under_way
        call, lock = self.overrides.plain(module, "_call_impl"), self.stream.lock

        def entered_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(module)
            with lock:
                if self.is_at_work:
                    self.stream.refuse_capture(units)
                    begun: list[Unit] = []
                    try:
                        for unit in units:
                            begun.append(unit)
                            enter(unit)
                        return out_of_buffers(call(*args, **kwargs), begun)
                    finally:
                        for unit in reversed(begun):
                            leave(unit, module, may_wait=bool(under_way))
            return self.overrides.now(module, "_call_impl")(*args, **kwargs)

        return entered_call

    def _bracket(self, name: str, units: list[Unit]) -> None:
        """Bracket the root's method called so, all of which needs `units`."""
        method = self.overrides.plain(self.root, name)

        def bracketed_call(*args: Any, **kwargs: Any) -> Any:
            refuse_tracing(self.root)
            self.stream.refuse_capture(self.units)
            with self.running(units) as begun:
                args, kwargs = on_device(self.device, args, kwargs, self.exclude_kwargs)
                return out_of_buffers(method(*args, **kwargs), begun)

        self.overrides.set(self.root, name, self._in_turn(self.root, name, bracketed_call))

    def _in_turn(self, module: nn.Module, name: str, at_work: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """What stands in for a method: `at_work` while the rule is, or the method itself; one thread at a time."""
        method, lock = self.overrides.plain(module, name), self.stream.lock
        chosen = at_work or method

        @functools.wraps(method)
        def called_in_turn(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if self.is_at_work:
                    return chosen(*args, **kwargs)
            return self.overrides.now(module, name)(*args, **kwargs)

        return called_in_turn

    def _set_aside(self, module: nn.Module, name: str) -> Callable[..., Any]:
        def changing_call(*args: Any, **kwargs: Any) -> Any:
            if self.is_running:
                raise RuntimeError(f"{name} is not possible while {type(self.root).__name__} is being called.")
            try:
                return self._changed(module, name, args, kwargs)
            except BaseException:
                if attachment_of(self.root) is None:  # an interrupt may have come before the rule was back
                    self.overrides.put_back()
                    refill_left(self.root, KEEPER)
                raise

        return self._in_turn(module, name, changing_call)

    def _changed(self, module: nn.Module, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        is_moved = name == "_apply" and moves(args[0], self.device)
        try:
            self.let_go()
            following = following_in(self.weights, module) if name == "_apply" and not is_moved else []
            self.weights = [weight for weight in self.weights if weight not in following]
            self.restore(to_given=False)
            with emptied(view.slot for weight in following for view in weight.views):
                result = self.overrides.plain(module, name)(*args, **kwargs)
            for weight in following:
                weight.follow(args[0])
            return result
        finally:
            if not is_moved and not has_moved(self.root, self.device):
                attach(self.root, self.rule, self.stream, exclude_kwargs=self.exclude_kwargs)
            else:
                self.overrides.put_back()
                if module is not self.root:
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
    attachment = Attachment(root, rule, stream, exclude_kwargs)
    with changing(root, attachment) as others:
        try:
            for other in others:
                _free_from(other, root)
            attachment.take(gather(slots(root)), index)
        except BaseException:
            for begun in (attachment, *others):
                begun.hand_over()
            for begun in (attachment, *others):
                refill(slot for slot in slots(begun.root) if isinstance(slot.tensor, AtRest))
                begun.overrides.put_back()
            raise
    return attachment


def detach(module: nn.Module) -> None:
    """Undo the offload of `module` and its parts, if any: weights go to their first devices, from meta to the host.

    Another thread's call of it is waited for; raises `RuntimeError` inside a call.
    """
    with changing(module) as attachments:
        for attachment in attachments:
            attachment.let_go()
            attachment.restore(to_given=True)
            attachment.overrides.put_back()
        refill_left(module, KEEPER)


@contextmanager
def set_aside(module: nn.Module) -> Generator[bool]:
    """End all rules on `module`, its parts and what is around it; attach them again after the `with` block.

    Yields whether a rule was at work on the whole module; its weights may be left at rest then. Another thread's call
    is waited for; raises `RuntimeError` inside a call of one of the modules.
    """
    claim = Claim(module, Stream(torch.device("cpu")))
    with changing(module, claim) as others:
        attachments = [other for other in others if isinstance(other, Attachment)]
        try:
            for attachment in attachments:
                attachment.hand_over()
            claim.overrides.undo_others()
            yield any(module in set(attachment.root.modules()) for attachment in attachments)
        finally:
            for attachment in attachments:  # the first of them takes the claim over
                attach(attachment.root, attachment.rule, attachment.stream, exclude_kwargs=attachment.exclude_kwargs)
            if not attachments:
                claim.overrides.put_back()


def _free_from(other: Claim, root: nn.Module) -> None:
    """End another rule on `root`: one on it or its parts hands its weights over, one around it is undone."""
    if other.root in set(root.modules()):
        other.hand_over()
        return
    if other.is_at_work:
        _warn_undone(other.root, f"a part of it ({type(root).__name__}, or a part of that) gets its own")
    other.let_go()
    other.restore(to_given=True)


def _warn_undone(root: nn.Module, reason: str) -> None:
    warnings.warn(f"The offload of {type(root).__name__} is undone, since {reason}.", stacklevel=5)
