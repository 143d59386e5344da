"""The call of a pipeline of diffusers as its source writes it: wrong names are told before torch is imported."""

from __future__ import annotations

import ast
import inspect
import re
from inspect import Parameter, Signature
from pathlib import Path

from lowtide.guests.library import pipeline_class, place_of_diffusers


def call_of(class_name: str) -> Signature:
    """The signature of a pipeline's call, without itself; the class is imported only where no source tells.

    Raises `NoGuestsError` where diffusers is not installed, and `CheckpointError` for a class that it does not have.
    """
    return written_call(class_name) or _imported_call(class_name)


def written_call(class_name: str) -> Signature | None:
    """As the source writes it; None for classes that are not found, or whose call is another class's."""
    begin = re.compile(rf"^class {re.escape(class_name)}\b", re.MULTILINE)
    for file in (place_of_diffusers(f"A {class_name}") / "pipelines").rglob("pipeline_*.py"):
        source = file.read_text(encoding="utf-8", errors="replace")
        if begin.search(source):
            return _call_in(source, file, class_name)
    return None


def _imported_call(class_name: str) -> Signature:
    signature = inspect.signature(pipeline_class(class_name).__call__)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _call_in(source: str, file: Path, class_name: str) -> Signature | None:
    for owner in ast.parse(source, str(file)).body:
        if isinstance(owner, ast.ClassDef) and owner.name == class_name:
            calls = (part for part in owner.body if isinstance(part, ast.FunctionDef) and part.name == "__call__")
            return next((_signature(call.args) for call in calls), None)
    return None


def _signature(arguments: ast.arguments) -> Signature:
    plain = [*arguments.posonlyargs, *arguments.args]
    values: list[ast.expr | None] = [*[None] * (len(plain) - len(arguments.defaults)), *arguments.defaults]
    parameters = [_parameter(each, value) for each, value in zip(plain, values, strict=True)][1:]  # without self
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters += [_parameter(each, value, Parameter.KEYWORD_ONLY) for each, value in pairs]
    if arguments.kwarg is not None:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def _parameter(each: ast.arg, value: ast.expr | None, kind: object = Parameter.POSITIONAL_OR_KEYWORD) -> Parameter:
    return Parameter(each.arg, kind, default=Parameter.empty if value is None else _value(value))  # pyright: ignore


def _value(written: ast.expr) -> object:
    """A default; None for one that is not written as numbers and words."""
    try:
        return ast.literal_eval(written)
    except ValueError:
        return None
