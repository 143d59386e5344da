"""Choose how the attention of a network is computed: of our models, and of those of `transformers`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowtide.ops.attention import BACKENDS, DEFAULT, AttentionBackend, attention, available_backends
from lowtide.sizes import parse_bytes
from lowtide.whole_numbers import whole

FOREIGN_NAME = "lowtide"
"""Under this name `transformers` knows our attention."""
_BEFORE = "_lowtide_attn_implementation"  # on a foreign model: what it had before


def set_attention_backend(
    modules: Iterable[nn.Module], name: str, *, chunk_bytes: int | str | None = None, op: Any = None
) -> None:
    """Have all attention in `modules` computed by the backend `name`; see `lowtide.ops.attention.AttentionBackend`.

    Raises `ValueError` for a backend that the modules' devices do not have; nothing is changed then.
    """
    networks = list(modules)
    for module in networks:
        _check(name, _device(module))
    limit = DEFAULT.chunk_bytes if chunk_bytes is None else parse_bytes(chunk_bytes)
    if limit < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes!r} is not possible: a chunk has at least one byte.")
    for module in networks:
        for part in attention_modules(module):
            kept = getattr(part, "attention_backend", DEFAULT).heads_at_once
            part.__dict__["attention_backend"] = AttentionBackend(name, limit, kept, op)
        _take_over(module)


def set_attention_slicing(modules: Iterable[nn.Module], slice_size: str | int | None) -> None:
    """Compute some heads at a time: "auto" half of them, "max" one, a number so many, None all.

    Raises `ValueError` for other sizes; nothing is changed then.
    """
    networks = list(modules)
    parts = [part for module in networks for part in attention_modules(module)]
    most = max((_heads(part) for part in parts), default=1)
    named = slice_size is None or isinstance(slice_size, str)
    if slice_size not in ("auto", "max", None) if named else not 1 <= (whole(slice_size) or 0) <= most:
        raise ValueError(
            f"slice_size={slice_size!r} is not possible: give 'auto' (half of the heads), 'max' (one at a time), or a "
            f"number of heads from 1 to {most}."
        )
    for part in parts:
        sizes: dict[Any, int | None] = {"auto": max(1, _heads(part) // 2), "max": 1, None: None}
        size = sizes[slice_size] if slice_size in sizes else int(slice_size)  # type: ignore[arg-type]
        part.__dict__["attention_backend"] = replace(getattr(part, "attention_backend", DEFAULT), heads_at_once=size)
    for module in networks:
        _take_over(module)


def xformers_or_sdpa(modules: Iterable[nn.Module], op: Any = None) -> None:
    """The backend "xformers"; where the library or the GPU is missing, PyTorch's own kernels, with one note."""
    networks = list(modules)
    if all("xformers" in available_backends(_device(module)) for module in networks):
        set_attention_backend(networks, "xformers", op=op)
        return
    warnings.warn(
        "xFormers is not there, or there is no GPU for it: PyTorch's own memory-efficient attention is used, which "
        "needs as little memory.",
        stacklevel=3,
    )
    set_attention_backend(networks, "sdpa")


def attention_modules(module: nn.Module) -> list[nn.Module]:
    """The layers in a network whose attention can be chosen."""
    if _is_foreign(module):
        return [part for part in module.modules() if type(part).__name__.endswith("Attention")]
    own = [module] if isinstance(getattr(module, "attention_backend", None), AttentionBackend) else []
    return own + [layer for child in module.children() for layer in attention_modules(child)]


def _check(name: str, device: torch.device) -> None:
    possible = available_backends(device)
    if name in possible:
        return
    problem = f"is not there on {device.type!r}" if name in BACKENDS else "is no attention backend"
    raise ValueError(f"{name!r} {problem}; available are {', '.join(possible)}.")


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _heads(part: nn.Module) -> int:
    return getattr(part, "heads", None) or getattr(part, "num_heads", None) or 1


# ---- models of transformers


def _is_foreign(module: nn.Module) -> bool:
    return callable(getattr(module, "set_attn_implementation", None))


def _take_over(module: nn.Module) -> None:
    """Put our attention into foreign models, or give theirs back where ours would do nothing else."""
    for model in foreign_models(module):
        plain = all(getattr(part, "attention_backend", DEFAULT) == DEFAULT for part in attention_modules(model))
        switchable: Any = model
        if plain and _BEFORE in model.__dict__:
            switchable.set_attn_implementation(model.__dict__.pop(_BEFORE))
            for part in attention_modules(model):
                part.__dict__.pop("attention_backend", None)
        elif not plain and _BEFORE not in model.__dict__:
            _register()
            model.__dict__[_BEFORE] = switchable.config._attn_implementation
            switchable.set_attn_implementation(FOREIGN_NAME)


def foreign_models(module: nn.Module) -> list[nn.Module]:
    """The models of `transformers` in a network; not those inside another, whose setting they share."""
    if _is_foreign(module):
        return [module]
    return [model for child in module.children() for model in foreign_models(child)]


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    AttentionInterface.register(FOREIGN_NAME, _foreign_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FOREIGN_NAME, sdpa_mask)


def _foreign_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as `transformers` calls it: `[B, N, L, H]` in, `[B, L, N, H]` out; no mask can mean a causal one.

    `position_bias`, T5's `[1, N, L, S]`, is added to the scores.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_()
    backend = getattr(module, "attention_backend", DEFAULT)
    out = attention(query, key, value, _with_bias(attention_mask, position_bias), backend, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """A mask and what is added to the scores, as one mask."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
