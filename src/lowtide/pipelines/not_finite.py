"""Numbers that are NaN or infinite: a picture of them is black, so they are told of, with the stage they arose in."""

from __future__ import annotations

import torch


class NotFiniteWarning(UserWarning):
    """A run made numbers that are NaN or infinite, so what it gives is not what was asked for.

    `warnings.simplefilter("error", lowtide.NotFiniteWarning)` makes it an error, which ends the run.
    """


_ADVICE = {
    "encode prompt": "Compute in bfloat16 or float32, and look at prompt_embeds that were given and at the text "
    "encoder's weights.",
    "denoise": "Compute in bfloat16 or float32, and look at latents that were given and at what callbacks return.",
    "decode": "Autoencoders overflow in float16 for some pictures: compute in bfloat16, or load that part in float32 "
    "(torch_dtype={'default': torch.float16, 'vae': torch.float32}).",
}


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether none is NaN or infinite; takes no memory. On meta there are none."""
    if numbers.is_meta or numbers.numel() == 0 or not numbers.is_floating_point():
        return True
    least, most = torch.aminmax(numbers)  # each is NaN where one of them is
    return bool((least.isfinite() & most.isfinite()).item())


def said_of(stage: str, numbers: torch.Tensor) -> str:
    """The warning for a stage whose result is not finite."""
    dtype = str(numbers.dtype).removeprefix("torch.")
    return (
        f"{stage}: numbers that are NaN or infinite came out of it, in {dtype}, so the result is not what was asked. "
        f"{_ADVICE.get(stage, '')}"
    ).rstrip()
