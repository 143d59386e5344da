"""A plan at work on a subject, and all that it takes to undo it, to shrink it, and to say what it took."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.casting import NAMED_CASTINGS, Casting
from lowtide.fitting.observers import Heap
from lowtide.fitting.prepare import Fit
from lowtide.fitting.process import has_run
from lowtide.fitting.rate_check import correction
from lowtide.fitting.run_report import RunReport, run_report
from lowtide.fitting.subject import Subject
from lowtide.machine.heap import steady_malloc, trim_heap
from lowtide.machine.memory_errors import out_of
from lowtide.machine.processor_share import Share, Watch
from lowtide.measuring.meter import Meter, StageReading
from lowtide.measuring.transfers import Flow, FlowMeter, ledgers_of, total_flow
from lowtide.memory.attach import attach, detach
from lowtide.memory.presets import model_rule, stream_for
from lowtide.memory.rule import Rule
from lowtide.memory.rule_changes import attachment_of, has_all_parameters, held_with
from lowtide.memory.stream import Stream
from lowtide.planning.machine_rates import correct_rates
from lowtide.planning.plan import Budgets, ComponentPlan, Plan
from lowtide.planning.rates import slower
from lowtide.sizes import format_decimal

_UNPLANNED = ComponentPlan()
_BETWEEN = "between two castings"
"""That of a network whose casting is being changed: an interrupt, or a fork, may leave it like that."""


@dataclass(frozen=True)
class Before:
    """How a subject was before a budget was given: its networks' rules and devices, and its stages' ways.

    Those that were loaded under a plan had no rule and were on no device.
    """

    rules: Mapping[str, tuple[Rule, torch.device]]
    devices: Mapping[str, torch.device]
    ways: Mapping[str, object]

    @classmethod
    def of(cls, subject: Subject, as_planned: Collection[str] = ()) -> Before:
        """That of a subject as it is now, but for the networks named `as_planned`."""
        modules = {name: module for name, module in subject.modules().items() if name not in as_planned}
        attachments = {name: attachment_of(module) for name, module in modules.items()}
        rules = {
            name: (attachment.rule, attachment.device)
            for name, attachment in attachments.items()
            if attachment is not None
        }
        free = {name: module for name, module in modules.items() if name not in rules}
        devices = {name: weight.device for name, module in free.items() if (weight := _a_weight(module)) is not None}
        return cls(rules, devices, {stage: ways.now() for stage, ways in subject.ways().items()})


def _a_weight(module: nn.Module) -> torch.Tensor | None:
    return next(module.parameters(), None)


@dataclass(frozen=True)
class CallTook:
    """What the last call took under which plan: stages as a meter read them, and bytes moved by the stage's name."""

    plan: Plan
    readings: tuple[StageReading, ...]
    flows: Mapping[str, Flow]


@dataclass
class AppliedPlan:
    """The plan at work on a subject.

    `names` has all networks that plans were put to work on, those that were replaced since among them, and `castings`
    the 8-bit forms that plans have put on them. Neither keeps a network alive.
    `lowered` are the budgets that are left since memory ran out, `degradations` what was made smaller then, in words.
    """

    subject: Subject
    fit: Fit
    plan: Plan
    before: Before
    names: WeakKeyDictionary[nn.Module, str] = field(default_factory=WeakKeyDictionary)
    castings: WeakKeyDictionary[nn.Module, str | None] = field(default_factory=WeakKeyDictionary)
    degradations: list[str] = field(default_factory=list)
    lowered: Budgets | None = None
    last_call: CallTook | None = None
    corrected: float = 1.0
    """By how much computing was found slower, in calls under this plan, than the rates that it was made with."""
    rates_note: str | None = None
    """What was corrected last, in words."""
    turn: Stream = field(default_factory=lambda: Stream(torch.device("cpu")))
    """It brings nothing. Who holds it, as every call of the subject does, holds the streams too that come meanwhile."""

    def put_to_work(self, fit: Fit, plan: Plan) -> None:
        """Have every network and every stage as a plan says.

        Whatever was done by hand since: networks may have been moved, replaced, or offloaded.
        """
        if fit.device.type == "cpu":
            steady_malloc()
        modules = self.subject.modules()
        chosen = {name: plan.components.get(name, _UNPLANNED) for name in modules}
        for name in sorted(chosen, key=lambda name: chosen[name].rule is None):  # what gives room first
            self.names[modules[name]] = name
            self._cast(modules[name], chosen[name].casting)
            put_under(modules[name], chosen[name], fit.device, self.turn)
        for stage, ways in self.subject.ways().items():
            ways.set(plan.way(stage))
        if plan is not self.plan:
            self.corrected = 1.0
        self.fit, self.plan = fit, plan
        trim_heap()

    def _cast(self, module: nn.Module, casting: str | None) -> None:
        before = self.castings.get(module)
        if casting != before:
            self.castings[module] = _BETWEEN
            if before is not None:
                remove_casting(module)
            if casting is not None:
                apply_casting(module, casting_for(module, casting))
            self.castings[module] = casting

    def undo(self) -> None:
        """Have every weight where it was before, under the offload that was set then.

        Also those of networks that were replaced since; what is done to these from now on is not undone.
        """
        modules = self.subject.modules()
        for module, name in {**self.names, **{module: name for name, module in modules.items()}}.items():
            self._undo(module, name)
            if module is not modules.get(name):
                self.names.pop(module, None)
        for stage, ways in self.subject.ways().items():
            if stage in self.before.ways:
                ways.put_back(self.before.ways[stage])

    def _undo(self, module: nn.Module, name: str) -> None:
        if self.castings.get(module) is not None:
            remove_casting(module)
            self.castings[module] = None
        detach(module)
        if name in self.before.rules:
            rule, device = self.before.rules[name]
            attach(module, rule, stream_for(device, rule))
        elif name in self.before.devices:
            module.to(self.before.devices[name])

    def shrink(self, stage: str, reason: str, *, of_host: bool = False) -> bool:
        """After memory ran out in a stage: go on with a plan that takes less, if there is one; whether there was.

        Less of the device's memory, or, on a GPU, `of_host`.
        """
        while (plan := self.fit.smaller(self.plan, stage, self._left, of_host=of_host)) is not None:
            most = plan.host_peak if of_host else plan.peak
            self.lowered, self.plan = self.fit.limited(self._left, most, of_host=of_host), plan
            try:
                self.put_to_work(self.fit, plan)
            except Exception as error:
                if out_of(error, self.fit.device) is None:
                    raise
                continue
            planned = plan.stage(stage)
            assert planned is not None
            less = format_decimal(planned.host if of_host else planned.peak)
            said = f"{stage}: memory ran out ({reason}); going on with a plan that takes {less} there"
            self.degradations.append(said)
            warnings.warn(said, stacklevel=4)
            return True
        return False

    @property
    def _left(self) -> Budgets:
        return self.lowered or self.fit.budgets

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Bracket a call: what it takes is measured, by a meter that watches already or by one of ours."""
        stages = self.subject.stages
        meter = next((observer for observer in stages.watching if isinstance(observer, Meter)), None)
        ours = Meter() if meter is None else meter
        earlier = len(ours.report())
        flows = FlowMeter(lambda: total_flow(ledgers_of(self.subject.modules().values())))
        watching = (Heap(lambda: self.plan),) if self.fit.device.type == "cpu" else ()
        processors, degraded = Watch(), len(self.degradations)
        try:
            with stages.observed(flows, *watching, *([ours] if meter is None else [])):
                yield
            is_whole = len(self.degradations) == degraded and not getattr(self.subject, "interrupt", False)
        except BaseException:
            is_whole = False
            raise
        finally:
            has_run(self.fit.device, self.subject.dtype)
            self.last_call = CallTook(self.plan, tuple(ours.report()[earlier:]), dict(flows.report()))
            if is_whole:
                self._check_rates(self.last_call, processors.share())

    def _check_rates(self, call: CallTook, share: Share) -> None:
        """Correct a CPU's measured rates, for plans from now on, where a call took clearly more or less time."""
        rates, device = self.fit.rates, self.fit.device
        if device.type != "cpu" or rates.assumed:
            return
        found = correction(call.plan, call.readings, call.flows, share, torch.get_num_threads(), self.corrected)
        if found is not None:
            factor, self.rates_note = found
            self.corrected *= factor
            self.fit = replace(self.fit, rates=slower(rates, factor))
            correct_rates(device, self.subject.dtype, factor)

    def report(self) -> RunReport:
        """What the last call took beside what its plan said; raises `RuntimeError` before the first one."""
        last = self.last_call  # once: another thread's call may end now
        if last is None or not last.readings:
            raise RuntimeError("There is nothing to report, since nothing has run since the budget was given.")
        return run_report(last.plan, last.readings, last.flows, self.degradations)


def put_under(module: nn.Module, chosen: ComponentPlan, device: torch.device, turn: Stream) -> None:
    """Have the weights of one network rest as a plan says; one that it does not know comes whole when it is called.

    In the middle of a call of this thread, which holds `turn`, it is held from then on as those are that it replaces.
    """
    rule = model_rule(device) if chosen is _UNPLANNED else chosen.rule
    attachment = attachment_of(module)
    if rule is None:
        detach(module)
        module.to(device)
    elif (
        attachment is None
        or attachment.rule != rule
        or attachment.device != device
        or not has_all_parameters(attachment)
    ):
        stream = stream_for(device, rule)
        if any(call.thread == threading.get_ident() for call in turn.holders):
            held_with(stream, turn)
        attach(module, rule, stream)


def casting_for(module: Any, name: str) -> Casting:
    """The casting called so, without the parts that the model says are never cast."""
    return NAMED_CASTINGS[name].sparing(getattr(module, "never_cast", ()))


def put_under_plan(subject: Subject, fit: Fit, plan: Plan, *, as_planned: Collection[str] = ()) -> None:
    """Put a plan to work; the networks named `as_planned` were loaded under it.

    All of it: if that fails, the subject is as it was, and the plan of before, if there was one, is put to work again
    before the next call. Raises `RuntimeError` in a call.
    """
    with subject.call_lock.between_calls("its budget"):
        earlier = subject.applied
        before = Before.of(subject, as_planned) if earlier is None else earlier.before
        modules, applied = subject.modules(), AppliedPlan(subject, fit, plan, before)
        if earlier is not None:
            applied.names, applied.castings = earlier.names, earlier.castings
        applied.castings |= {
            modules[name]: plan.components[name].casting for name in as_planned if name in plan.components
        }
        try:
            subject.applied = applied
            applied.put_to_work(fit, plan)
        except BaseException:
            subject.applied = earlier
            if earlier is None:
                applied.undo()
            raise
