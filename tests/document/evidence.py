"""What the document's scripts must have brought about: asked at their end, inside their own process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lowtide.casting.cast_leaf import leaves
from lowtide.memory.attach import attachment_of


def of_this_tree() -> None:
    """The library is the one beside these tests, and the peer was not needed."""
    import lowtide

    assert Path(lowtide.__file__).is_relative_to(Path(__file__).parents[2] / "src"), lowtide.__file__
    assert "diffusers" not in sys.modules


def pictures(images: list[Image.Image], *, count: int, size: tuple[int, int]) -> None:
    """So many pictures of this width and height, none of one colour, no two the same."""
    assert len(images) == count, f"{len(images)} pictures, not {count}"
    for image in images:
        assert image.size == tuple(size), f"{image.size} is not {size}"
        assert any(low != high for low, high in image.getextrema()), "a picture of one colour"
    assert len({image.tobytes() for image in images}) == count, "the same picture twice"


def clip(video: list[Image.Image], *, frames: int, size: tuple[int, int]) -> None:
    """So many frames of this width and height, none of one colour, no two the same."""
    pictures(video, count=frames, size=size)


def is_film(name: str) -> None:
    """The file is an MP4 film, as its first box says, and not an empty one."""
    content = Path(name).read_bytes()
    assert content[4:8] == b"ftyp", content[:16]
    assert len(content) > 1000, f"{len(content)} bytes"


def cast(pipe: Any, name: str) -> None:
    """This network's weights rest in 8 bits, and no other's."""
    assert {part for part, module in pipe.modules().items() if leaves(module)} == {name}


def offloaded(pipe: Any) -> None:
    """The weights of every network rest elsewhere."""
    for name, module in pipe.modules().items():
        assert attachment_of(module) is not None, f"{name} is not offloaded"


def channels_last(pipe: Any, *, size: tuple[int, int]) -> None:
    """A picture with the U-Net's weights so laid out."""
    assert pipe.unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    pictures(pipe("sea", num_inference_steps=1).images, count=1, size=size)


def is_saved(file: str) -> None:
    """The trace is in the file, and can be loaded."""
    assert isinstance(torch.jit.load(file), torch.jit.ScriptModule)


def same_as_untraced(traced: Any, model: str, dtype: torch.dtype, device: str) -> None:
    """The loaded trace computes what the network computes, at the traced shapes and at the network's own size."""
    from lowtide import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype).to(device)
    unet.to(memory_format=torch.channels_last)
    seeds = torch.Generator().manual_seed(3)
    outputs = []
    with torch.inference_mode():
        x = torch.randn((2, 4, unet.config.sample_size, unet.config.sample_size), generator=seeds).to(device, dtype)
        text = torch.randn((2, 77, unet.config.cross_attention_dim), generator=seeds).to(device, dtype)
        for time in (998, 3):  # bfloat16 has no 998
            ours, theirs = traced(x, torch.tensor(time), text)[0], unet(x, torch.tensor(time), text).sample
            error = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            assert error < 8 * torch.finfo(dtype).eps, f"the trace is off by {error:.2g} at time {time}"
            outputs.append(ours)
    assert not torch.equal(*outputs), "the trace does not depend on the time"
