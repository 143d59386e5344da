"""Who may ask: keys from a file, compared so that the time it takes tells nothing."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Header, Request

from lowtide.serve.problems import ProblemError

ANYONE = "anyone"
"""The owner of jobs where no keys are asked for."""


def keys_in(file: Path) -> tuple[str, ...]:
    """The keys in a file, one a line; empty lines and those that begin with # are left out.

    Raises `ValueError` for a file without keys and for keys of fewer than 16 characters.
    """
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{file} has no key: write one in each line.")
    if min(map(len, keys)) < 16:
        raise ValueError(f"A key in {file} has fewer than 16 characters, so it could be guessed: make them longer.")
    return keys


def owner_of(authorization: str | None, keys: tuple[str, ...]) -> str:
    """Whose request it is; raises `ProblemError` where its key is none of those asked for."""
    if not keys:
        return ANYONE
    scheme, _, given = (authorization or "").partition(" ")
    known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]  # all of them, always
    if scheme.lower() != "bearer" or not any(known):
        raise ProblemError(
            401, "A key is asked for here: send it as 'Authorization: Bearer KEY'.", {"WWW-Authenticate": "Bearer"}
        )
    return hashlib.sha256(keys[known.index(True)].encode()).hexdigest()[:16]


def owner(request: Request, authorization: Annotated[str | None, Header()] = None) -> str:
    """Whose request it is, by the keys of the application."""
    request.state.owner = owner_of(authorization, request.app.state.keys)  # for the log
    return request.state.owner


Owner = Annotated[str, Depends(owner)]
"""A parameter of a route: whose request it is."""
