"""One run at a time through a scheduler: its state would be lost between two."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from lowtide.calls import Call, Calls
from lowtide.forks import new_lock


class _Claim(Call):
    """A run through a scheduler, which has no entry of its own for that, so that its copies are free."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler


_claims: Calls[_Claim] = Calls()
_lock = new_lock()


@contextmanager
def claimed(scheduler: Any) -> Generator[None]:
    """Claim a scheduler for one run; raises `RuntimeError` where another pipeline's run goes through it."""
    this = _Claim(scheduler)
    try:
        with _lock:
            if scheduler is not None and any(claim.scheduler is scheduler for claim in _claims):
                raise RuntimeError(
                    "This pipeline's scheduler is in use already, by a call of another pipeline: the scheduler's state "
                    "would be lost. Give each pipeline its own, as in "
                    f"pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config)."
                )
            _claims.begin(this)
        yield
    finally:
        with _lock:
            _claims.end(this)
