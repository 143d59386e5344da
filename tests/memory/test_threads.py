"""Two threads on one module under a rule: whichever comes second waits, whether it calls the module or changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.forked import SECONDS, Beside, Parked
from tests.lines import line_of, places
from tests.memory.cases import CPU, RULES, Case, all_at_rest, put, toy
from tests.memory.ruled import Ruled, expected, is_bounded, made
from torch import nn

from lowtide.casting.apply_casting import apply_casting, remove_casting
from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.memory import attachment_of, detach
from lowtide.memory.placeholder import AtRest
from lowtide.memory.stream import Stream
from lowtide.pipelines.offloading import held
from lowtide.prediction.meta_copy import meta_copy

BY_RING = Ruled("leaves ahead", zero_copy=False)
AT_WORK = line_of("memory/attach.py", "return out_of_buffers(call(")
LEAVING = line_of("memory/stream.py", "if unit.count == 0 and not unit.stays")
DROPPED = LEAVING._replace(line=LEAVING.line + 1)
WORK = {f"memory/{name}.py" for name in ("settling", "store", "stream", "weight")}
"""Where a change has begun, and has not come to its end."""

PLACES = [2, pytest.param(4, marks=pytest.mark.slow)]
"""At about so many places a change is stopped; at each a test waits a while for what must not end."""


def load_other_weights(case: Case) -> None:
    state = case.module.state_dict()
    case.module.load_state_dict({name: tensor.clone() + 1 for name, tensor in state.items()})


CHANGES: dict[str, Callable[[Case], object]] = {
    "another rule": lambda case: put(case.module, RULES["model"], zero_copy=False),
    "a rule on a part": lambda case: put(case.module.attention, RULES["model"], zero_copy=False),  # type: ignore[arg-type]
    "no rule": lambda case: detach(case.module),
    "another dtype": lambda case: case.module.to(torch.float64),
    "other weights": load_other_weights,
}
pytestmark = pytest.mark.filterwarnings("ignore:The offload of Toy is undone:UserWarning")


def changed(change: str) -> Case:
    module, _ = made(BY_RING)
    CHANGES[change](module)
    return module


def missed(case: Case) -> int | None:
    """How often a call has asked for a weight that had not come; None without a rule."""
    attachment = attachment_of(case.module)
    return None if attachment is None else attachment.stream.ledger.missed


@pytest.mark.parametrize("count", PLACES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_waits_for_a_change(change: str, count: int) -> None:
    """It computes what is there afterwards, by the rule that is there then."""
    example, other = changed(change), made(BY_RING)[0]
    result, found = example.run(), places(lambda: CHANGES[change](other), ("memory/",))
    first = next(number for number, place in enumerate(found) if "is_at_work = False" in place.source)
    chosen = [place for place in found[first:] if place.file in WORK]
    for place in chosen[:: len(chosen) // count]:
        module, _ = made(BY_RING)
        with Parked(lambda module=module: CHANGES[change](module), place) as parked:
            assert parked.has_come, str(place)
            call = Beside(module.run)
            assert call.waits, str(place)
        assert torch.equal(call.ended(), result), str(place)
        assert missed(module) == missed(example), str(place)
        attachment = attachment_of(module.module)
        assert attachment is None or all_at_rest(attachment), str(place)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_waits_for_a_call(change: str) -> None:
    result, (module, _) = changed(change).run(), made(BY_RING)
    with Parked(module.run, AT_WORK) as parked:
        other = Beside(lambda: CHANGES[change](module))
        assert other.waits
    assert torch.equal(parked.result, expected(BY_RING))
    other.ended()
    assert torch.equal(module.run(), result)


@pytest.mark.parametrize("count", PLACES)
@pytest.mark.parametrize("is_ruled", [False, True])
def test_one_change_waits_for_another(count: int, *, is_ruled: bool) -> None:
    """Also where there is no rule so far, so that neither finds the lock of one."""

    def start() -> Case:
        return made(BY_RING)[0] if is_ruled else toy(torch.float32)

    def change(module: Case) -> object:
        return put(module.module, RULES["blocks ahead"], zero_copy=False)

    example = start()
    chosen = places(lambda: change(example), ("memory/settling",))
    for place in chosen[:: len(chosen) // count]:
        module = start()
        with Parked(lambda module=module: change(module), place) as parked:
            assert parked.has_come, str(place)
            detached = Beside(lambda module=module: detach(module.module))
            other = Beside(lambda module=module: put(module.module, RULES["model"]))
            assert other.waits, str(place)
        _, attachment = detached.ended(), other.ended()
        assert attachment_of(module.module) in {None, attachment}, str(place)
        assert torch.equal(module.run(), expected(BY_RING)), str(place)
        detach(module.module)
        assert not any(isinstance(parameter, AtRest) for parameter in module.module.parameters()), str(place)
        assert not any(name.startswith("_lowtide") for inner in module.module.modules() for name in vars(inner))


def test_a_casting_waits_for_a_rule() -> None:
    module = toy(torch.float32)
    with Parked(lambda: put(module.module, RULES["blocks ahead"]), line_of("memory/attach.py", "settle_rests(")):
        cast = Beside(lambda: apply_casting(module.module, NAMED_CASTINGS["int8"]))
        assert cast.waits
    cast.ended()
    assert torch.equal(module.run(), expected(Ruled("blocks ahead", is_cast=True)))
    assert attachment_of(module.module) is not None


def test_a_rule_waits_for_a_casting() -> None:
    module = toy(torch.float32)
    in_casting = line_of("casting/cast_module.py", "install(module, made)")
    with Parked(lambda: apply_casting(module.module, NAMED_CASTINGS["int8"]), in_casting):
        ruled = Beside(lambda: put(module.module, RULES["blocks ahead"]))
        assert ruled.waits
    attachment = ruled.ended()
    assert attachment_of(module.module) is attachment
    assert torch.equal(module.run(), expected(Ruled("blocks ahead", is_cast=True)))


class Slow(nn.Linear):
    """A layer that takes its weight, and computes with it when it is told to."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        self.has_begun.set()
        assert self.may_go_on.wait(SECONDS)
        return nn.functional.linear(x, weight)


@pytest.mark.parametrize("is_whole", [False, True])
def test_two_threads_call_one_part(*, is_whole: bool) -> None:
    """One is about to drop the weights, which the other would compute with after their memory is used again."""
    torch.manual_seed(0)
    module = nn.Sequential(Slow(), nn.Linear(8, 8, bias=False)).requires_grad_(False)
    slow, x = module[0], torch.ones(1, 8)
    alone, whole = slow(x), module(x)
    attachment = put(module, RULES["sequential"], zero_copy=False)
    called: Any = module if is_whole else slow
    with Parked(lambda: (called(x), module(x)), DROPPED) as parked:
        slow.has_begun.clear()
        slow.may_go_on.clear()
        other = Beside(lambda: slow(x))
        assert not slow.has_begun.wait(0.3)
        slow.may_go_on.set()
    assert all(map(torch.equal, parked.result, (whole if is_whole else alone, whole)))
    assert torch.equal(other.ended(), alone)
    assert all_at_rest(attachment)
    assert is_bounded(attachment)


def test_parts_that_two_threads_call_take_turns_in_the_ring() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Slow(), *(nn.Linear(8, 8, bias=False) for _ in range(3))).requires_grad_(False)
    slow, x = module[0], torch.ones(1, 8)
    results = [part(x) for part in module]
    attachment = put(module, RULES["sequential"], zero_copy=False)
    slow.has_begun.clear()
    slow.may_go_on.clear()
    first = Beside(lambda: slow(x))
    assert slow.has_begun.wait(SECONDS)
    others = [Beside(lambda part=part: part(x)) for part in module[1:]]
    assert all(other.waits for other in others)
    slow.may_go_on.set()
    assert all(map(torch.equal, [first.ended(), *(other.ended() for other in others)], results))
    assert attachment.stream.ledger.peak <= attachment.bound


def test_what_a_state_dict_gives_is_at_rest() -> None:
    """And not in memory that the call of another thread uses again."""
    module, _ = made(BY_RING)
    given = {name: tensor.clone() for name, tensor in toy(torch.float32).module.state_dict().items()}
    with Parked(module.run, AT_WORK):
        states = [Beside(module.module.state_dict), Beside(module.module.blocks.state_dict)]  # type: ignore[union-attr]
        assert all(state.waits for state in states)
    module.run()
    state, of_a_part = (state.ended() for state in states)
    assert all(torch.equal(state[name], tensor) for name, tensor in given.items() if name != "calls")
    assert all(torch.equal(of_a_part[name], given[f"blocks.{name}"]) for name in of_a_part)


def test_a_copy_on_meta_and_a_call_wait_for_each_other() -> None:
    """Between two looks at a slot weights would come, and be copied."""
    module, _ = made(BY_RING)
    with Parked(module.run, AT_WORK):
        copied = Beside(lambda: meta_copy(module.module))
        assert copied.waits
    copying = line_of("prediction/meta_copy.py", "return copy.deepcopy(module, on_meta)")
    with Parked(lambda: meta_copy(module.module), copying) as parked:
        call = Beside(module.run)
        assert call.waits
    assert torch.equal(call.ended(), expected(BY_RING))
    for made_of in (copied.ended(), parked.result):
        assert all(tensor.is_meta for tensor in (*made_of.parameters(), *made_of.buffers()))


def test_modules_in_different_orders_do_not_wait_for_each_other() -> None:
    """As two pipelines have the networks that they share."""
    streams = [Stream(CPU), Stream(CPU)]

    def hold(streams: list[Stream]) -> bool:
        with held(streams):
            return True

    with Parked(lambda: hold(streams), line_of("memory/stream.py", "self.holders.begin(")) as parked:
        other = Beside(lambda: hold(streams[::-1]))
        assert other.waits
    assert parked.result is other.ended() is True


@pytest.mark.parametrize("change", ["cast anew", "uncast", "another dtype", "other weights"])
def test_a_cast_layer_that_is_called_is_refused_by_name(change: str) -> None:
    module = nn.Sequential(Slow(), nn.Linear(8, 8)).requires_grad_(False)
    apply_casting(module, NAMED_CASTINGS["int8"])
    slow, x = module[0], torch.ones(1, 8)
    changes: dict[str, Callable[[], object]] = {
        "cast anew": lambda: apply_casting(module, NAMED_CASTINGS["fp8"]),
        "uncast": lambda: remove_casting(module),
        "another dtype": lambda: module.to(torch.bfloat16),
        "other weights": lambda: module.load_state_dict({"0.weight": torch.ones(8, 8)}, strict=False),
    }
    result = module(x)
    slow.has_begun.clear()
    slow.may_go_on.clear()
    call = Beside(lambda: module(x))
    assert slow.has_begun.wait(SECONDS)
    with pytest.raises(RuntimeError, match=r"Slow is being called, so it cannot be changed now\. Wait for the end\."):
        changes[change]()
    slow.may_go_on.set()
    assert torch.equal(call.ended(), result)
    assert torch.equal(module(x), result)
