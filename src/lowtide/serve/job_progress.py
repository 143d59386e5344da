"""How far a job is: its steps, what is left, and the memory that is in use."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lowtide.serve.job import Job


@dataclass
class Progress:
    """Of a job that runs: the latest that was heard of it. Seconds are of this attempt."""

    job: Job
    begun: float = field(default_factory=time.monotonic)
    picture: int = 0
    step: int = 0
    steps: int | None = None
    preview: str | None = None
    seconds_left: float | None = None
    made_progress: bool = False
    is_cancelled: bool = False
    _first: int = -1

    def hear(self, message: dict[str, Any]) -> None:
        """Take in what the process that computes tells."""
        if "picture" not in message:
            return
        if self._first < 0 and message["step"]:
            self._first = message["picture"]
        self.picture, self.step = message["picture"], message["step"]
        self.steps = message.get("steps") or self.job.call.get("num_inference_steps")
        self.preview = message.get("preview") or self.preview
        self.made_progress |= message.get("new", 0) > 0 or self.picture > self._first >= 0
        self.seconds_left = self._left()

    def _left(self) -> float | None:
        """By the pace so far once that says something, and before by the plan."""
        passed = time.monotonic() - self.begun
        pictures = len(self.job.seeds)
        done = (self.picture + (self.step / self.steps if self.steps else 0)) / pictures
        if done < 0.1:
            return max(0.0, self.job.seconds - passed)
        return passed / done - passed

    def shown(self) -> dict[str, Any]:
        """As it is told."""
        content = {
            "picture": self.picture,
            "pictures": len(self.job.seeds),
            "step": self.step,
            "steps": self.steps,
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left, 1),
        }
        return content if self.preview is None else {**content, "preview": self.preview}
