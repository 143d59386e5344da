"""The training loop that both networks share: seeded, with checkpoints, resumable, with averaged weights."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    """How long to train and how fast. The rate warms up, stays, and falls linearly to zero over the last share."""

    steps: int
    rate: float
    warmup: int = 200
    final_share: float = 0.35
    save_every: int = 500
    average: float = 0.998

    def rate_at(self, step: int) -> float:
        """Learning rate at a step."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / (self.final_share * self.steps))
        return self.rate * min(rise, fall)


def train(
    module: nn.Module,
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    schedule: Schedule,
    checkpoint: Path,
    look: Callable[[nn.Module, int], None],
) -> nn.Module:
    """Train `module` to the end of the schedule, from `checkpoint` if that exists; return the averaged copy.

    `loss_of(step)` returns named terms; the term "loss" is minimised. It must draw its random numbers from the step
    alone, so that a resumed run continues as if it had never stopped. `look(averaged, step)` is called at each
    checkpoint.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    averaged = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=_averaging(schedule))
    step = _resume(checkpoint, module, averaged, optimizer)
    started, first = time.time(), step
    while step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        terms = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(module)
        step += 1
        if step % 50 == 0:
            named = "  ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
            print(
                f"step {step}/{schedule.steps}  {(time.time() - started) / (step - first):.3f} s  {named}", flush=True
            )
        if step % schedule.save_every == 0 or step == schedule.steps:
            _save(checkpoint, module, averaged, optimizer, step)
            look(averaged.module, step)
    return averaged.module


def _averaging(schedule: Schedule) -> Callable[..., None]:
    """An exponential average that forgets its start: the early decay is (1 + n) / (10 + n)."""

    def update(average: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor | int) -> None:
        decay = min(schedule.average, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(average, current, 1 - decay)

    return torch.no_grad()(update)


def _save(path: Path, module: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "module": module.state_dict(), "averaged": averaged.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save({**state, "optimizer": optimizer.state_dict()}, partial)
    os.replace(partial, path)


def _resume(path: Path, module: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=next(module.parameters()).device, weights_only=True)
    module.load_state_dict(state["module"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing {path} at step {state['step']}", flush=True)
    return int(state["step"])
