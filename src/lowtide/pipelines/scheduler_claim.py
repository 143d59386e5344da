"""One run at a time through a scheduler: its state would be lost between two."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_claimed: dict[int, Any] = {}
"""The schedulers that runs are going through, by their ids: no entry of their own, so that copies are free."""
_lock = threading.Lock()


@contextmanager
def claimed(scheduler: Any) -> Generator[None]:
    """Claim a scheduler for one run; raises `RuntimeError` where another pipeline's run goes through it."""
    claim: list[int] = []
    try:
        with _lock:
            if id(scheduler) in _claimed:
                raise RuntimeError(
                    "This pipeline's scheduler is in use already, by a call of another pipeline: the scheduler's state "
                    "would be lost. Give each pipeline its own, as in "
                    f"pipe.scheduler = {type(scheduler).__name__}.from_config(pipe.scheduler.config)."
                )
            if scheduler is not None:
                claim.append(id(scheduler))
                _claimed[id(scheduler)] = scheduler
        yield
    finally:
        with _lock:
            for key in claim:
                _claimed.pop(key, None)
