"""Change rules while nobody calls the modules: whoever begins meanwhile waits for the end of the change."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lowtide.forks import new_lock
from lowtide.memory.overrides import Overrides
from lowtide.memory.placeholder import AtRest
from lowtide.memory.stream import Stream

if TYPE_CHECKING:
    from lowtide.memory.attach import Attachment

_MARK = "_lowtide_attachment"  # on the root
KEEPER = "_lowtide_keeper"  # on every module inside
_claims_lock = new_lock()


class Claim:
    """A module that one thread changes: marked, with all its parts, so that others wait for the lock of `stream`.

    An attachment is one that stays. `overrides` are undone with the marks, or taken over by the next claim.
    """

    is_at_work = False

    def __init__(self, root: nn.Module, stream: Stream) -> None:
        self.root = root
        self.stream = stream
        self.overrides = Overrides(KEEPER, _MARK)

    def take_over(self, others: Iterable[Claim]) -> None:
        """Have other threads find this claim in place of `others`, whose overrides go with it."""
        for other in others:
            self.overrides.take_over(other.overrides)
        self.overrides.mark(self.root, _MARK, self)
        for module in self.root.modules():
            self.overrides.mark(module, KEEPER, self)

    @property
    def is_running(self) -> bool:
        """Whether the module is being called, as far as is known."""
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of the module are nobody's."""
        return _nobody, ()

    def let_go(self) -> None:
        """Nothing is to be let go."""

    hand_over = let_go

    def restore(self, *, to_given: bool) -> None:
        """Nothing was taken."""


def _nobody() -> None:
    return None


def changing(module: nn.Module, claim: Claim | None = None) -> AbstractContextManager[list[Any]]:
    """Bracket a change of the rules on `module` and its parts, and with a `claim` to it, of those around it, too.

    Yields them, as claims. Waits for calls of other threads; raises `RuntimeError` inside a call of one of the modules.
    """
    return _undisturbed(module, inside if claim is None else concerned, _check_idle, claim)


def undisturbed(module: nn.Module) -> AbstractContextManager[list[Any]]:
    """While this lasts, no other thread calls what is under a rule in `module`, or changes it. It waits for those."""
    return _undisturbed(module, concerned)


@contextmanager
def _undisturbed(
    module: nn.Module,
    find: Callable[[nn.Module], list[Claim]],
    check: Callable[[list[Claim]], None] = lambda _: None,
    claim: Claim | None = None,
) -> Generator[list[Claim]]:
    mine = [] if claim is None else [claim]
    while True:
        claims = find(module)
        with locked(in_turn(each.stream for each in (*claims, *mine))):
            with _claims_lock:
                has_changed = claims != find(module)
                if not has_changed:
                    check(claims)
                    for each in mine:
                        each.take_over(claims)
            if not has_changed:
                yield claims
                return


def attachment_of(module: nn.Module) -> Attachment | None:
    """The rule at work on `module`, if there is one."""
    mark = module.__dict__.get(_MARK)
    return mark if mark is not None and mark.is_at_work else None


def has_all_parameters(attachment: Attachment) -> bool:
    """Whether a rule has every parameter of its module: none was replaced, or came with another part, since.

    Ask between calls.
    """
    placed = {id(tensor) for unit in attachment.units for group, _ in unit.placed for tensor in group}
    parameters = (parameter for module in attachment.root.modules() for parameter in module._parameters.values())
    return all(
        parameter is None or isinstance(parameter, AtRest) or id(parameter) in placed or parameter.numel() == 0
        for parameter in parameters
    )


def inside(module: nn.Module) -> list[Claim]:
    """Those to a module and its parts, also of attachments whose coming or going was cut short."""
    marks = (inner.__dict__.get(_MARK) for inner in module.modules())
    return [mark for mark in marks if mark is not None]


def concerned(module: nn.Module) -> list[Claim]:
    """Those inside, and those around it."""
    keepers = (inner.__dict__.get(KEEPER) for inner in module.modules())
    return list(dict.fromkeys([*inside(module), *(keeper for keeper in keepers if keeper is not None)]))


def _check_idle(claims: Iterable[Claim]) -> None:
    for claim in claims:
        if claim.is_running:
            raise RuntimeError(
                f"{type(claim.root).__name__} is being called, so its offload cannot be changed now. Wait for the end."
            )


def in_turn(streams: Iterable[Stream]) -> list[Stream]:
    """Each once, in the order in which every thread takes them, so that no two wait for each other."""
    return sorted(set(streams), key=lambda stream: stream.number)


@contextmanager
def locked(streams: Sequence[Stream]) -> Generator[None]:
    """Hold their locks. No `ExitStack`: what an interrupt in its end leaves waits for a collection of garbage."""
    if not streams:
        yield
        return
    with streams[0].lock, locked(streams[1:]):
        yield


def held_with(stream: Stream, other: Stream) -> None:
    """Have whoever holds `other` now hold `stream` too, until then: one that comes in the middle of a call.

    Call it before anybody uses the stream. It has the other's lock from then on.
    """
    stream.lock, stream.number = other.lock, other.number
    for call in other.holders:
        stream.holders.begin(call)
