"""What a request may ask for at most, whatever would fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most of each: bytes of a body, of one with files, characters of a prompt, pictures of a job, pixels of a
    picture, frames of a clip, steps, jobs that wait, seconds that a request waits for its plan, and pictures that
    one call makes.
    """

    body: int = 2**20
    upload: int = 2**25
    prompt: int = 4000
    pictures: int = 10
    pixels: int = 4096 * 4096
    frames: int = 1000
    steps: int = 500
    queued: int = 100
    planning: float = 60.0
    together: int = 1
