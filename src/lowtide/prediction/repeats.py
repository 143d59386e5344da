"""Tell whether a module or operator is called again with inputs of the same shapes, dtypes and strides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from lowtide.memory.overrides import is_override

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.Size, torch.device)


@dataclass(frozen=True)
class Form:
    """How a tensor of a result lies: in the memory of an input, or in new memory of so many bytes, by number.

    The offset is in elements, from where the input begins or from the beginning of the new memory.
    """

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


@dataclass(frozen=True)
class ObjectForm:
    """An object among inputs that is no tensor: its class, and its `meta_form`, on which what a call takes depends."""

    kind: type[Any]
    form: Any


@dataclass(frozen=True)
class _Same:
    """Stands for an object that is after a call where it was before it."""


class Base(NamedTuple):
    """The memory of an input, by its key, and the offset in elements from which on the input lies in it."""

    memory: int
    offset: int


def bases_of(tensors: Iterable[torch.Tensor]) -> list[Base]:
    """Where tensors lie."""
    return [Base(tensor.untyped_storage()._cdata, int(tensor.storage_offset())) for tensor in tensors]


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


def objects_stay(before: Any, after: Any) -> bool:
    """Whether objects that are no tensors are where they were before a call, and have the form that they had."""
    return list(_objects(before)) == list(_objects(after))


def _objects(form: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], ObjectForm]]:
    if isinstance(form, ObjectForm):
        yield at, form
    elif isinstance(form, tuple):
        for place, part in enumerate(form):
            yield from _objects(part, (*at, place))


def _form(value: Any, tensors: list[torch.Tensor], memories: dict[int, int]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        memory = memories.setdefault(value.untyped_storage()._cdata, len(memories))
        return memory, value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, PLAIN):
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), *(_form(element, tensors, memories) for element in value)
    if type(value) is dict:
        return dict, *((key, _form(element, tensors, memories)) for key, element in value.items())
    if hasattr(value, "meta_form"):
        return ObjectForm(type(value), value.meta_form)
    raise TypeError(type(value))


def forms_of_result(result: Any, inputs: Iterable[Base | None], left: Any = None) -> tuple[Any, Any, list[int]] | None:
    """How to make such a result again, what a call has `left` of its inputs, and the bytes of each new memory.

    `inputs` are in the order of `form_of_call`, with None for those that are gone. None for a result of other objects
    than tensors.
    """
    forms = _Forms(inputs)
    try:
        return forms.of(result), forms.of(left, objects_stay=True), list(forms.sizes.values())
    except TypeError:
        return None


class _Forms:
    """The forms of what a call has made and left, and the sizes of new memories."""

    def __init__(self, inputs: Iterable[Base | None]) -> None:
        there = [(place, base) for place, base in enumerate(inputs) if base is not None]
        self._memories = {base.memory: (place, base.offset) for place, base in reversed(there)}
        self.sizes: dict[int, int] = {}

    def of(self, value: Any, *, objects_stay: bool = False) -> Any:
        """The form of a value; raises `TypeError` for objects that are no tensors, unless they stay where they are."""
        if isinstance(value, PLAIN):
            return value
        if type(value) in (tuple, list):
            return type(value)(self.of(element, objects_stay=objects_stay) for element in value)
        if isinstance(value, dict):
            values = {key: self.of(element, objects_stay=objects_stay) for key, element in value.items()}
            return values if type(value) is dict else DictForm(type(value), values)
        if objects_stay and hasattr(value, "meta_form"):
            return _Same()
        if type(value) is not torch.Tensor:
            raise TypeError(type(value))
        return self._of_tensor(value)

    def _of_tensor(self, tensor: torch.Tensor) -> Form:
        storage, offset = tensor.untyped_storage(), int(tensor.storage_offset())
        is_input = storage._cdata in self._memories
        if is_input:
            place, begin = self._memories[storage._cdata]
            offset -= begin
        else:
            self.sizes.setdefault(storage._cdata, storage.nbytes())
            place = list(self.sizes).index(storage._cdata)
        return Form(place, is_input, storage.nbytes(), tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)


def inputs_in(form: Any) -> Iterator[int]:
    """The places of the inputs in whose memory a result lies."""
    if isinstance(form, Form):
        if form.is_input:
            yield form.place
    elif isinstance(form, (tuple, list)) and not isinstance(form, torch.Size):
        for element in form:
            yield from inputs_in(element)
    elif isinstance(form, (dict, DictForm)):
        yield from inputs_in(list((form.values if isinstance(form, DictForm) else form).values()))


def made_again(form: Any, inputs: Sequence[torch.Tensor | None], memories: dict[int, torch.Tensor]) -> Any:
    """The result of another call, on meta; `memories` is to be empty."""
    if isinstance(form, Form):
        return _tensor_again(form, inputs, memories)
    if isinstance(form, (*PLAIN, _Same)):
        return form
    if isinstance(form, DictForm):
        return form.kind(**{key: made_again(value, inputs, memories) for key, value in form.values.items()})
    if isinstance(form, dict):
        return {key: made_again(value, inputs, memories) for key, value in form.items()}
    return type(form)(made_again(element, inputs, memories) for element in form)


def _tensor_again(form: Form, inputs: Sequence[torch.Tensor | None], memories: dict[int, torch.Tensor]) -> torch.Tensor:
    if not form.is_input:
        if form.place not in memories:
            memories[form.place] = torch.empty(form.nbytes, dtype=torch.uint8, device="meta")
        return memories[form.place].view(form.dtype).as_strided(form.shape, form.stride, form.offset)
    base = inputs[form.place]
    assert base is not None
    if (base.dtype, tuple(base.shape), base.stride(), 0) == (form.dtype, form.shape, form.stride, form.offset):
        return base
    return base.as_strided(form.shape, form.stride, base.storage_offset() + form.offset)


def let_go(values: Any) -> None:
    """Have lists and dicts among a call's inputs hold None in place of tensors."""
    for key, element in list(values.items() if isinstance(values, dict) else enumerate(values)):
        if isinstance(element, torch.Tensor):
            if isinstance(values, (list, dict)):
                values[key] = None
        elif type(element) in (tuple, list, dict):
            let_go(element)


def refill(old: Any, new: Any) -> Any:
    """Have lists and dicts among a call's inputs hold what they held after the call whose inputs were alike."""
    if isinstance(new, _Same) or type(old) is not type(new) or type(old) not in (tuple, list, dict):
        return old if isinstance(new, _Same) else new
    if type(old) is dict:
        filled = {key: refill(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(filled)
    else:
        filled = [*(refill(*pair) for pair in zip(old, new, strict=False)), *new[len(old) :]]
        if type(old) is list:
            old[:] = filled
    return old
