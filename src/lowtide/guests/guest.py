"""A foreign pipeline as a subject: its networks, its calls, and how they keep to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowtide.fitting import fit as fitting
from lowtide.fitting.applied_plan import AppliedPlan
from lowtide.fitting.call_lock import CallLock
from lowtide.fitting.meta_subject import MetaSubject, Original
from lowtide.fitting.observers import Tidy
from lowtide.guests.brackets import Brackets
from lowtide.guests.driven_guest import DrivenGuest, stage_name
from lowtide.guests.ghost import ghost_of
from lowtide.guests.guest_call import GuestCall
from lowtide.guests.guest_decode import GuestDecode
from lowtide.guests.networks import components_of, networks_of
from lowtide.guests.own_files import remember_files
from lowtide.guests.quantized import bytes_where_quantized
from lowtide.guests.refusals import RefusedMethods, check_can_be_planned, refusal
from lowtide.loading.blueprint import InFiles
from lowtide.memory.rule_changes import attachment_of
from lowtide.memory.stream import Stream
from lowtide.pipelines.offloading import held
from lowtide.pipelines.scheduler_claim import claimed
from lowtide.planning.plan import Plan
from lowtide.planning.workload import WHOLE
from lowtide.prediction.meta_copy import weights_in_files
from lowtide.stages import Stages
from lowtide.weights.provenance import check_files
from lowtide.weights.slots import slots


class Guest:
    """A pipeline of another library; a `lowtide.fitting.subject.Subject`. `own_class` is its class."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.own_class: type[Any] = type(pipe)
        self.applied: AppliedPlan | None = None
        self.call_lock = CallLock()
        self.stages = Stages()
        self.refused = RefusedMethods()

    @property
    def scheduler(self) -> Any:
        """What changes from step to step: the pipeline's scheduler."""
        return getattr(self.pipe, "scheduler", None)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return networks_of(self.pipe)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights."""
        sizes: dict[torch.dtype, int] = {}
        for network in self.modules().values():
            for slot in slots(network):
                if slot.tensor.is_floating_point():
                    sizes[slot.tensor.dtype] = sizes.get(slot.tensor.dtype, 0) + slot.tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)

    @property
    def vocabulary(self) -> int:
        """Words that tokenizers in memory know."""
        parts = components_of(self.pipe).items()
        return sum(len(part) for name, part in parts if "tokenizer" in name and hasattr(part, "__len__"))

    def ways(self) -> dict[str, GuestDecode]:
        """The ways of every stage that decodes."""
        ways = {stage_name(name, "decode"): GuestDecode.for_(network) for name, network in self.modules().items()}
        return {name: decode for name, decode in ways.items() if decode is not None}

    def usual_size(self, **asked: Any) -> GuestCall:
        """A call with these arguments. Raises `TypeError` for those that it does not take."""
        return GuestCall.of(self.pipe, asked)

    def on_meta(self, device: torch.device, in_files: InFiles | None = None) -> MetaSubject:
        """A copy with networks on meta, which decodes at once. `in_files` are those of networks that are on meta.

        Raises `ValueError` for networks that cannot be under a plan, before anything is changed.
        """
        check_can_be_planned(self.modules())
        files = dict(in_files or {})
        remember_files(network for name, network in self.modules().items() if name not in files)
        for name, network in self.modules().items():
            if name not in files:
                files[name] = weights_in_files(network)
        ghost = self.with_networks_on_meta()
        return DrivenGuest(ghost, files, device, Original.of(self), quantized=bytes_where_quantized(self.modules()))

    def with_networks_on_meta(self) -> Guest:
        """A guest that is a copy with networks on meta, which decodes at once."""
        ghost = Guest(ghost_of(self.pipe))
        for ways in ghost.ways().values():
            ways.set(WHOLE)
        return ghost

    # ---- calls

    @property
    def device(self) -> torch.device | None:
        """Where the plan computes; None without one."""
        applied = self.applied  # once: another thread may undo it now
        return None if applied is None else applied.fit.device

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The pipeline's own call, within the budget. Raises what it raises, and `BudgetError` before it begins.

        `RuntimeError` too where blended tiles were turned on by hand.
        """
        with self.call_lock.call(), claimed(self.scheduler):
            if self.applied is None:  # undone by another thread, for which this one has waited
                return self.own_class.__call__(self.pipe, *args, **kwargs)
            self._check_tiles(self.applied.plan)
            self.refused.put_on(self.modules())  # networks may have been replaced
            fitting.before_call(self, GuestCall.bound(self.pipe, args, kwargs))
            check_files(tensor for network in self.modules().values() for tensor in network.parameters())
            tidy = Tidy(self.streams, every_step=True)
            streams = (*self.streams(), self.applied.turn)
            with held(streams), self.applied.measured(), self.stages.observed(tidy), Brackets(self).on():
                return self.own_class.__call__(self.pipe, *args, **kwargs)

    def _check_tiles(self, plan: Plan) -> None:
        for stage, ways in self.ways().items():
            if ways.tiles_by_hand(plan.way(stage)):
                network = stage.rpartition(".")[0]
                raise RuntimeError(
                    f"{refusal(network, 'enable_tiling')} Now, pipe.{network}.disable_tiling() is enough."
                )

    def streams(self) -> list[Stream]:
        """The streams that bring the networks' weights to work, each once."""
        attachments = (attachment_of(network) for network in self.modules().values())
        return list(dict.fromkeys(attachment.stream for attachment in attachments if attachment is not None))
