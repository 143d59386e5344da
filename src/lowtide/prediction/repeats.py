"""Tell whether a module or operator is called again with inputs of the same shapes, dtypes and strides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lowtide.memory.overrides import is_override

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.Size, torch.device)


@dataclass(frozen=True)
class Form:
    """How a tensor of a result lies: in the memory of an input, or in new memory of so many bytes, by number."""

    place: int
    is_input: bool
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class DictForm:
    """A dict, or an object of a class derived from it, with the forms of what it holds."""

    kind: type[Any]
    values: dict[str, Any]


class Signatures:
    """Numbers that are equal for modules of equal structure."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, tuple[nn.Module, int]] = {}

    def of(self, module: nn.Module) -> int:
        """The number of a module."""
        if id(module) not in self._known:
            content = (
                type(module),
                tuple(
                    _attribute(name, attribute)
                    for name, attribute in vars(module).items()
                    if name not in ("_modules", "training") and not is_override(attribute)
                ),
                tuple((name, None if child is None else self.of(child)) for name, child in module._modules.items()),
            )
            self._known[id(module)] = (module, self._numbers.setdefault(content, len(self._numbers)))
        return self._known[id(module)][1]


def _attribute(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return name, tuple((key, _tensor(element)) for key, element in value.items())
    return name, _fixed(value)


def _tensor(value: Any) -> Any:
    is_tensor = isinstance(value, torch.Tensor)
    return (value.shape, value.stride(), value.dtype, value.requires_grad) if is_tensor else _fixed(value)


def _fixed(value: Any) -> Any:
    """Something equal only for what makes no difference."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(map(_fixed, value))
    if isinstance(value, (set, frozenset)) and all(isinstance(element, str) for element in value):
        return frozenset(value)
    if isinstance(value, FunctionType):
        return (value.__code__, *(_plain_or_same(held) for held in _held_by(value)))
    return (type(value),) if not getattr(value, "__dict__", True) else id(value)


def _held_by(function: FunctionType) -> Iterator[Any]:
    """What a function finds in its defaults and in the variables of the function that it was written in."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (cell.cell_contents for cell in function.__closure__ or ())


def _plain_or_same(value: Any) -> Any:
    return (type(value), value) if isinstance(value, PLAIN) else id(value)


def form_of_call(args: Any, kwargs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]] | None:
    """What can be compared of a call's inputs, and the tensors among them; None where other objects are."""
    tensors: list[torch.Tensor] = []
    try:
        return _form((args, tuple(sorted(kwargs.items()))), tensors, {}), tensors
    except TypeError:
        return None


def is_unchanged(form: tuple[Any, list[torch.Tensor]], args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call has left its inputs as `form_of_call` saw them: lists and dicts may be filled and emptied."""
    now = form_of_call(args, kwargs)
    return now is not None and now[0] == form[0] and all(a is b for a, b in zip(now[1], form[1], strict=True))


def _form(value: Any, tensors: list[torch.Tensor], memories: dict[int, int]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
        return memory, value.shape, value.stride(), value.storage_offset(), value.dtype, value.requires_grad
    if isinstance(value, PLAIN):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), *(_form(element, tensors, memories) for element in value)
    if type(value) is dict:
        return dict, *((key, _form(element, tensors, memories)) for key, element in value.items())
    raise TypeError(type(value))


def forms_of_result(result: Any, inputs: list[torch.Tensor]) -> tuple[Any, int] | None:
    """How to make such a result again, and its new bytes; None for other objects than tensors."""
    memories = {tensor.untyped_storage()._cdata: (place, True) for place, tensor in reversed(list(enumerate(inputs)))}
    inherited, sizes = len(memories), {}
    try:
        forms = _forms(result, memories, sizes)
    except TypeError:
        return None
    assert len(memories) == inherited + len(sizes)
    return forms, sum(sizes.values())


# Functions inside functions that call themselves would keep tensors alive until garbage is collected.
def _forms(value: Any, memories: dict[int, tuple[int, bool]], sizes: dict[int, int]) -> Any:
    if value is None:
        return None
    if type(value) in (tuple, list):
        return type(value)(_forms(element, memories, sizes) for element in value)
    if isinstance(value, dict):
        return DictForm(type(value), {key: _forms(element, memories, sizes) for key, element in value.items()})
    if type(value) is not torch.Tensor:
        raise TypeError(type(value))
    storage = value.untyped_storage()
    if storage._cdata not in memories:
        memories[storage._cdata] = len(sizes), False
        sizes[storage._cdata] = storage.nbytes()
    place, is_input = memories[storage._cdata]
    stride, offset = value.stride(), int(value.storage_offset())
    return Form(place, is_input, storage.nbytes(), value.dtype, tuple(value.shape), stride, offset)


def made_again(form: Any, inputs: list[torch.Tensor], memories: dict[int, torch.Tensor]) -> Any:
    """The result of another call, on meta; `memories` is to be empty."""
    if form is None:
        return None
    if isinstance(form, DictForm):
        return form.kind(**{key: made_again(value, inputs, memories) for key, value in form.values.items()})
    if not isinstance(form, Form):
        return type(form)(made_again(element, inputs, memories) for element in form)
    if not form.is_input:
        if form.place not in memories:
            memories[form.place] = torch.empty(form.nbytes, dtype=torch.uint8, device="meta")
        return memories[form.place].view(form.dtype).as_strided(form.shape, form.stride, form.offset)
    base = inputs[form.place]
    same = (form.dtype, form.shape, form.stride, form.offset)
    is_same = (base.dtype, tuple(base.shape), base.stride(), base.storage_offset()) == same
    return base if is_same else base.as_strided(form.shape, form.stride, form.offset)
