"""Something has changed: whoever waits for that looks again."""

from __future__ import annotations

import asyncio


class Changes:
    """Changes by number, so that none is missed between a look and the wait for the next."""

    def __init__(self) -> None:
        self.number = 0
        self._next = asyncio.Event()

    def tell(self) -> None:
        """Something has changed."""
        self.number += 1
        told, self._next = self._next, asyncio.Event()
        told.set()

    async def after(self, number: int) -> None:
        """Wait for a change after the one with this number."""
        while self.number == number:
            await self._next.wait()
