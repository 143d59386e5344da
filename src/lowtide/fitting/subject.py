"""What can be fitted: anything with networks, with stages that can be traced on meta, and with a lock for its calls.

Pipelines of ours are one kind of subject. Planning and fitting know nothing else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import nn

from lowtide.fitting.call_lock import CallLock
from lowtide.planning.run_size import RunSize
from lowtide.planning.workload import Call, Work
from lowtide.stages import Stages

if TYPE_CHECKING:
    from lowtide.fitting.applied_plan import AppliedPlan
    from lowtide.fitting.meta_subject import MetaSubject


class Ways(Protocol):
    """The ways in which one stage can be gone through, by the names in `lowtide.planning.workload.WAYS`."""

    @property
    def settings(self) -> Collection[str]:
        """Names of the attributes that `set` changes: a trace does not depend on what they are now."""
        ...

    def set(self, way: str) -> None:
        """Go through the stage in this way from now on."""
        ...

    def now(self) -> object:
        """How the stage is gone through now, for `put_back`."""
        ...

    def put_back(self, before: object) -> None:
        """Go through the stage as it was when `now` was asked."""
        ...

    def traced(
        self, names: Sequence[str], inputs: Sequence[torch.Tensor], trace: Callable[[], Call], whole: Work
    ) -> Mapping[str, Call]:
        """On meta: the calls of those of the ways called `names` that serve for these inputs; set to whole afterwards.

        `trace` goes through the stage once as it is set; `whole` is the work of going through it at once.
        """
        ...


@dataclass(frozen=True)
class TracedStage:
    """A stage as a subject on meta describes it: `run` is one of its `calls`, with `inputs` alive before.

    `carried` and `tail` are bytes: what is alive all along beside the call, and what the result needs at once on its
    way to what is asked for. What `run` computes is one part in `parts` of the call's work: the rest of it is alike.
    """

    name: str
    component: str
    calls: int
    run: Callable[[], Any]
    inputs: tuple[torch.Tensor, ...]
    carried: int = 0
    tail: int = 0
    parts: float = 1.0
    ways: Ways | None = None


class Size(Protocol):
    """What a run is asked for, as far as its memory and time depend on it. Sizes can be compared and hashed."""

    def to_dict(self) -> dict[str, Any]:
        """The size as a plan keeps it: what JSON can hold."""
        ...


class Subject(Protocol):
    """What planning and fitting need of a pipeline."""

    applied: AppliedPlan | None
    """The plan at work; None where no budget was given."""
    call_lock: CallLock
    stages: Stages
    scheduler: Any
    """What changes from step to step beside the result; None where nothing does."""

    def modules(self) -> Mapping[str, nn.Module]:
        """The networks by name."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in."""
        ...

    @property
    def vocabulary(self) -> int:
        """Words that a tokenizer in memory knows; 0 without one."""
        ...

    def ways(self) -> Mapping[str, Ways]:
        """For each stage that can be gone through in several ways, these."""
        ...

    def usual_size(self, **asked: Any) -> Size:
        """The size of a run where nothing else is said: the model's own, or what of it is `asked` otherwise.

        Raises `ValueError` or `TypeError` for what is no part of a size, and `ValueError` for what cannot be made.
        """
        ...

    def on_meta(self, device: torch.device) -> MetaSubject:
        """A copy with networks on meta, every stage set to be gone through whole, to be planned for a device."""
        ...


class StagedSubject(Subject, Protocol):
    """A subject that can say which stages a run of a size has, so that one call of each is traced."""

    def with_networks_on_meta(self) -> Self:
        """A copy with networks on meta, every stage set to be gone through whole."""
        ...

    def traced_stages(self, size: RunSize) -> Iterator[TracedStage]:
        """The stages of a run of this size in order, for a subject on meta."""
        ...

    def calls_in_steps(self, steps: int) -> Mapping[str, int]:
        """For each stage that takes steps, how often its network is called in so many."""
        ...
