"""What a request holds, and the call that it becomes."""

from __future__ import annotations

import secrets
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.serve.limits import Limits
from lowtide.serve.problems import ProblemError

MOST_SEED = 2**63 - 1
SIZE = r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"
LONGEST = 30 * 24 * 3600.0


class CallRequest(BaseModel):
    """A picture or clip, or several, by one model. What is left out is as the model has it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None
    width: int | None = Field(None, ge=8)
    height: int | None = Field(None, ge=8)
    num_frames: int | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    strength: float | None = Field(None, ge=0, le=1)
    sampler: str | None = Field(None, max_length=40)
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    n: int = Field(1, ge=1)
    deadline: float | None = Field(None, gt=0, le=LONGEST, description="Seconds from now, after which it is ended.")

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither")
        return self

    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return self.model_dump(exclude={"model", "seed", "n", "deadline"}, exclude_none=True)

    def seeds(self) -> list[int]:
        """The seed of each picture: those after the one asked for, or after one that is drawn."""
        first = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [(first + place) % (MOST_SEED + 1) for place in range(self.n)]

    def check(self, limits: Limits) -> None:
        """Raise `ProblemError` for more than the server takes."""
        pixels = (self.width or 0) * (self.height or 0)
        asked = {
            "prompt": (len(self.prompt), limits.prompt, "characters"),
            "negative_prompt": (len(self.negative_prompt or ""), limits.prompt, "characters"),
            "n": (self.n, limits.pictures, "pictures"),
            "width x height": (pixels, limits.pixels, "pixels"),
            "num_frames": (self.num_frames or 0, limits.frames, "frames"),
            "num_inference_steps": (self.num_inference_steps or 0, limits.steps, "steps"),
        }
        for name, (number, most, unit) in asked.items():
            if number > most:
                raise ProblemError(422, f"{name}: {number} {unit} were asked for, and {most} are possible here.")


class SizedRequest(CallRequest):
    """The same as OpenAI's clients write it: `size` is "512x512", width and height, or "auto" for the model's own."""

    size: str = Field("auto", pattern=SIZE)

    def fields_without(self, *names: str) -> dict[str, Any]:
        """What a `CallRequest` is made of; `names` are the fields that it does not have."""
        fields = self.model_dump(exclude={"size", *names})
        if self.size != "auto":
            fields["width"], fields["height"] = map(int, self.size.split("x"))
        return fields
