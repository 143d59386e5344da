"""Messages between the server and the process that computes: JSON objects, a line each, over a socket.

Each side reads until the other is gone, so that neither outlives the other unnoticed.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]


def encoded(message: Message) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Channel:
    """The end of the process that computes; several threads may send."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; raises `OSError` where the other side is gone."""
        with self._lock:
            self._end.sendall(encoded(message))

    def received(self) -> Iterator[Message]:
        """Messages as they come, until the other side is gone."""
        with self._end.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
