"""Operators on meta: PyTorch takes long to tell the form of a result, so it is asked once for each form of inputs.

Once in a process, since a form depends on nothing else.
"""

from __future__ import annotations

from typing import Any

from lowtide.ops.meta_device import meant_device
from lowtide.prediction.operators import made_by
from lowtide.prediction.repeats import bases_of, form_of_call, forms_of_result, is_unchanged, made_again

MOST_FORMS = 16384
"""Forms that are kept; a plan for a large pipeline asks for up to 2,000."""

_FORMS: dict[Any, Any] = {}
"""Forms of results by the device that is meant, the operator and the form of its inputs."""


def result_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operator on meta, laid out as on the meant device if there is one."""
    meant = meant_device()
    make = made_by if meant is not None else _called
    fixed = tuple(tuple(arg) if type(arg) is list else arg for arg in args)
    form = None if func.is_view else form_of_call(fixed, kwargs)
    if form is None or not form[1] or not all(tensor.is_meta for tensor in form[1]):
        return make(func, args, kwargs)
    key, tensors = (meant, func, form[0]), form[1]
    known = _FORMS.get(key)
    if known is not None:
        return made_again(known[0], tensors, {})
    result = make(func, args, kwargs)
    forms = forms_of_result(result, bases_of(tensors))
    if forms is not None and is_unchanged(form, fixed, kwargs):  # else it gave a tensor another form
        if len(_FORMS) >= MOST_FORMS:
            _FORMS.clear()
        _FORMS[key] = forms
    return result


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)
