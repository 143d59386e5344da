"""An accelerator's memory runs out in the middle of a call: on a stand-in, with everything that goes on with less."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fitting import fits
from tests.fitting.traced_once import traced_once  # noqa: F401
from tests.guests.families import FAMILIES, run
from tests.guests.guest_cases import WARNINGS
from tests.sim_tensor import simulated
from torch import nn

import lowtide
from lowtide.fitting.applied_plan import put_under
from lowtide.fitting.resuming import Attempts
from lowtide.memory.rule import Level, Rule
from lowtide.memory.rule_changes import attachment_of
from lowtide.memory.stream import Stream
from lowtide.planning.plan import ComponentPlan

pytestmark = [*WARNINGS, pytest.mark.usefixtures("traced_once")]
DEVICES = [torch.device("sim", index) for index in range(2)]
OUT_OF_MEMORY = torch.OutOfMemoryError("SIM out of memory. Tried to allocate 2.00 GiB")


def attempts_on(device: torch.device) -> Attempts:
    applied = SimpleNamespace(fit=SimpleNamespace(device=device), shrink=lambda *_, **__: True)
    return Attempts(SimpleNamespace(applied=applied, scheduler=None), "denoise", ())  # type: ignore[arg-type]


def drawn(attempts: Attempts, *, fails: bool) -> list[torch.Tensor]:
    """What an attempt draws on every device, and what comes after it."""

    def noise() -> list[torch.Tensor]:
        return [torch.randn(3, device=device).cpu() for device in (*DEVICES, "cpu")]

    torch.manual_seed(0)
    failures = [OUT_OF_MEMORY] * fails
    while True:
        with attempts:
            made = noise()
            if failures:
                raise failures.pop()
            return [*made, *noise()]


def test_every_device_in_use_draws_the_same_noise_again() -> None:
    with simulated():
        there = torch.ones(1, device=DEVICES[0])  # in use; the other one is what the plan is for
        whole = drawn(attempts_on(DEVICES[1]), fails=False)
        again = drawn(attempts_on(DEVICES[1]), fails=True)
        assert all(map(torch.equal, again, whole))
        assert not torch.equal(whole[0], whole[3]), "they do draw on"
        del there


def test_nobody_asks_for_a_generator_that_a_graph_captures() -> None:
    with simulated() as sim:
        sim.captures = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sim, "random_state", lambda _: pytest.fail("CUDA would raise"))
            drawn(attempts_on(DEVICES[1]), fails=False)


@dataclass(frozen=True)
class Case:
    """A pipeline, the network that its steps go through, the size of a call, and the call."""

    pipe: Any
    network: nn.Module
    size: dict[str, Any]
    make: Callable[[], torch.Tensor]


def pictures(folder: Path) -> Case:
    pipe: Any = fits.load(fits.checkpoint(folder, "pictures"), "pictures")
    size = {"height": 64, "width": 64}
    call = {**size, "num_images_per_prompt": 1, "generator": None, "num_inference_steps": 2}
    return Case(pipe, pipe.unet, {**size, "pictures": 1}, lambda: fits.make(pipe, **call).cpu())


def guest(folder: Path) -> Case:
    family = FAMILIES["ZImage"]()
    return Case(family.pipeline, family.pipeline.transformer, family.call, lambda: run(family).cpu())


SLOW = pytest.mark.slow


@pytest.fixture
def case(kind: Callable[[Path], Case], tmp_path: Path) -> Case:
    if kind is guest:
        pytest.importorskip("diffusers")
    return kind(tmp_path)


def noisy(module: nn.Module, patch: pytest.MonkeyPatch, failures: list[BaseException]) -> list[torch.Tensor]:
    """Have every call of a network add noise of the device's own generator; the second one fails, where it may."""
    forward, kept = type(module).forward, list[torch.Tensor]()

    def call(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
        one = x[0] if isinstance(x, list) else x
        if one.device.type != "sim":  # planned
            return forward(self, x, *args, **kwargs)
        noise = torch.randn(one.shape, device=one.device)
        kept.append(noise.cpu())
        if len(kept) == 2 and failures:
            kept.pop()
            raise failures.pop()
        return forward(self, [one + noise, *x[1:]] if isinstance(x, list) else x + noise, *args, **kwargs)

    patch.setattr(type(module), "forward", call)
    return kept


@pytest.mark.parametrize("kind", [guest, pytest.param(pictures, marks=SLOW)])
def test_a_call_that_runs_short_draws_the_same_noise_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated():
        lowtide.fit(case.pipe, vram="1GB", ram="40GB", device="sim:1", **case.size)
        failures: list[BaseException] = []
        kept = noisy(case.network, monkeypatch, failures)
        torch.manual_seed(0)
        expected, noise = case.make(), kept.copy()
        kept.clear()
        failures.append(OUT_OF_MEMORY)
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="memory ran out"):
            made = case.make()
        assert all(map(torch.equal, kept, noise))
        assert torch.allclose(made, expected, rtol=0, atol=1e-5)
        lowtide.unfit(case.pipe)


def test_a_network_that_streams_from_the_middle_on_is_held_to_the_end() -> None:
    """It stays loaded between its calls, and other threads wait."""
    with simulated(), torch.no_grad():
        module, turn = nn.Sequential(nn.Linear(8, 8)).eval(), Stream(torch.device("cpu"))
        whole = ComponentPlan(Rule(Level.WHOLE))
        with turn.held():
            put_under(module, whole, DEVICES[1], turn)
            stream = stream_of(module)
            for _ in range(3):
                module(torch.ones(1, 8))
            assert loads(stream) == 1
            assert not is_free(stream)
        assert not stream.holders
        assert is_free(stream)
        stream.rest()  # as at the end of every stage
        for _ in range(2):
            module(torch.ones(1, 8))
        assert loads(stream) == 3, "nobody holds it any more"


@pytest.mark.parametrize("kind", [pictures, pytest.param(guest, marks=SLOW)])
def test_streams_that_come_with_a_smaller_plan_are_held_to_the_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated():
        lowtide.fit(case.pipe, vram="1GB", ram="40GB", device="sim:1", **case.size)
        failures: list[BaseException] = [OUT_OF_MEMORY]
        noisy(case.network, monkeypatch, failures)
        network, seen = case.network, list[bool]()
        forward = type(network).forward

        def look(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not failures and attachment_of(network) is not None and self is network:
                seen.append(bool(stream_of(network).holders) and not is_free(stream_of(network)))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(network), "forward", look)
        with pytest.warns(UserWarning, match="memory ran out"):
            case.make()
        assert seen
        assert all(seen)
        assert is_free(stream_of(network))
        assert torch.isfinite(case.make()).all()
        lowtide.unfit(case.pipe)


def stream_of(module: nn.Module) -> Stream:
    attachment = attachment_of(module)
    assert attachment is not None
    return attachment.stream


def loads(stream: Stream) -> int:
    return sum(account.loads for account in stream.ledger.by_unit.values())


def is_free(stream: Stream) -> bool:
    """Whether another thread could use it now."""

    def taken() -> bool:
        has_it = stream.lock.acquire(blocking=False)
        if has_it:
            stream.lock.release()
        return has_it

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(taken).result()
