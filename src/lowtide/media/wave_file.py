"""Sound in a file: 16-bit PCM, as every player reads it."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

from lowtide.media.unfinished import whole_or_not

_LOUDEST = 2**15 - 1


def write_wave(samples_CT: np.ndarray, path: Path, rate: int) -> None:
    """Write samples `[channels, time]`, floats in [-1, 1], as so many of each channel a second; louder ones are cut.

    At any moment there is the old file or the whole new one under the name. Raises `ValueError` for NaN and infinity,
    and `OSError` where it cannot be written.
    """
    if not np.isfinite(samples_CT).all():
        raise ValueError("The sound holds NaN or infinity: nothing can be heard there. Was the model's dtype float16?")
    levels_CT = (samples_CT.clip(-1, 1) * _LOUDEST).round().astype("<i2")
    with whole_or_not(path) as unfinished, wave.open(str(unfinished), "wb") as out:
        out.setnchannels(levels_CT.shape[0])
        out.setsampwidth(levels_CT.itemsize)
        out.setframerate(rate)
        out.writeframes(levels_CT.T.tobytes())
