"""Collects the decoded frames of clips in the form that was asked for, without holding a clip twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lowtide.pipelines.pipeline_outputs import to_pil, to_unit_range


class Frames:
    """Takes decoded frames one clip after the other; `result` has all frames as "pil", "np" or "pt".

    Shapes: `clips` clips of `frames` frames each; "np" is float32 `[B, F, H, W, 3]`, "pt" `[B, F, 3, H, W]` as decoded,
    both in [0, 1]; "pil" a list of PIL images for each clip.
    """

    def __init__(self, output_type: str, clips: int, frames: int) -> None:
        self._frames: Any = [[] for _ in range(clips)] if output_type == "pil" else None
        self._output_type = output_type
        self._shape = clips, frames
        self._count = 0

    def add(self, clip: int, first: int, frames_3FHW: torch.Tensor) -> None:
        """Take frames of clip number `clip`, nominally in [-1, 1], from frame number `first` on, in order."""
        assert first + frames_3FHW.shape[1] <= self._shape[1], "more frames than the latents make"
        self._count += frames_3FHW.shape[1]
        for place, frame in enumerate(frames_3FHW.unbind(1), start=first):
            pixels_3HW = to_unit_range(frame)
            if self._output_type == "pt":
                self._tensor(pixels_3HW)[clip, place] = pixels_3HW
                continue
            pixels_HW3 = pixels_3HW.detach().cpu().permute(1, 2, 0).float().numpy()
            if self._output_type == "np":
                self._array(pixels_HW3)[clip, place] = pixels_HW3
            else:
                self._frames[clip] += to_pil(pixels_HW3[None])

    @property
    def result(self) -> Any:
        """All frames, once every clip is complete."""
        assert self._count == self._shape[0] * self._shape[1], "fewer frames than the latents make"
        return self._frames

    def _tensor(self, like_3HW: torch.Tensor) -> torch.Tensor:
        if self._frames is None:
            self._frames = like_3HW.new_empty((*self._shape, *like_3HW.shape))
        return self._frames

    def _array(self, like_HW3: np.ndarray) -> np.ndarray:
        if self._frames is None:
            self._frames = np.empty((*self._shape, *like_HW3.shape), dtype=np.float32)
        return self._frames
