"""Networks of other libraries built from their configurations alone: parameters on meta, buffers with their numbers.

Buffers that no file holds, such as rotary positions, are computed by constructors; on meta they would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowtide.configs import CheckpointError, read_json
from lowtide.forks import new_lock
from lowtide.models.bounded_build import MOST_TENSORS
from lowtide.quiet import quiet

_default_dtype = new_lock()
_EMPTY = {torch.empty, torch.empty_like, torch.empty_strided}
_FILLED = {torch.zeros, torch.ones, torch.full, torch.randn, torch.rand, torch.arange, torch.linspace, torch.eye}
MOST_COMPUTED = 2**24
"""Numbers of the largest table that a constructor computes; larger ones are parameters, which files hold."""
_INIT = "torch.nn.init"


class _Empty(TorchFunctionMode):
    """Makes memory without numbers, which is what layers make their parameters of, on meta; and all that is large."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY:
            self.count += 1
            if self.count > MOST_TENSORS:
                raise CheckpointError(f"It describes a network of more than {MOST_TENSORS} tensors.")
            kwargs = {**kwargs, "device": "meta"}
        if func in _FILLED and func(*args, **{**kwargs, "device": "meta"}).numel() > MOST_COMPUTED:
            kwargs = {**kwargs, "device": "meta"}
        if getattr(func, "__module__", None) == _INIT:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]  # all is filled later
        return func(*args, **kwargs)


@contextmanager
def _building(dtype: torch.dtype) -> Generator[None]:
    """As the libraries build networks that they load: new numbers are of this dtype. One thread at a time."""
    with _default_dtype:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _Empty(), quiet(), torch.no_grad():
                yield
        finally:
            torch.set_default_dtype(before)


def empty_network(cls: type[Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network of a class from the `config.json` of a folder, for weights of a dtype.

    Raises `CheckpointError` for a configuration that the class cannot be built from.
    """
    file = folder / "config.json"
    config = read_json(file)
    try:
        with _building(dtype):
            network = _of_transformers(cls, folder, dtype) if hasattr(cls, "config_class") else cls.from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:  # the class may raise anything at what a file says
        said = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{file}: a {cls.__name__} cannot be built from it: {said}") from error
    for owner in network.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                owner._parameters[name] = nn.Parameter(empty, requires_grad=False)
    large = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if large:
        raise CheckpointError(f"{file}: its {large[0]} would have more than {MOST_COMPUTED} numbers.")
    tie: Any = getattr(network, "tie_weights", None)
    if callable(tie):
        tie()
    return network.eval().requires_grad_(False)


def _of_transformers(cls: type[Any], folder: Path, dtype: torch.dtype) -> nn.Module:
    config = cls.config_class.from_pretrained(folder)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "model_type"))):
        part._attn_implementation = None  # a file does not choose the kernels: a name may stand for foreign code
    config.dtype = dtype
    return cls(config)


def dtype_in_configs(folder: Path, names: Iterable[str]) -> torch.dtype:
    """The dtype that the first of these components' configurations to name one names for its weights; else float32.

    Only transformers writes it: "torch_dtype", or "dtype" from version 5 on.
    """
    for file in (folder / name / "config.json" for name in names):
        config = read_json(file) if file.is_file() else {}
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        if isinstance(named, torch.dtype):
            return named
    return torch.float32


def is_quantized(folder: Path) -> bool:
    """Whether the configuration says that the weights are in a library's own quantized form."""
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False
