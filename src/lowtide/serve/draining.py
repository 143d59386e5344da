"""How the server ends: what runs may end, what waits stays for the next server, and who waits is told."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType

import uvicorn

from lowtide.serve.dispatcher import Dispatcher
from lowtide.serve.log_lines import say

ANSWERING = 5
"""Seconds for answers that are on their way when no job runs any more."""


class DrainingServer(uvicorn.Server):
    """Ends at the first signal when the running jobs have ended, or after `seconds`; at the second one at once.

    Until then it answers, and refuses new jobs.
    """

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, seconds: float) -> None:
        config.timeout_graceful_shutdown = ANSWERING
        super().__init__(config)
        self._dispatcher, self._seconds = dispatcher, seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._is_asked = False

    async def main_loop(self) -> None:
        """Answer until it is time to end."""
        self._loop = asyncio.get_running_loop()
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn has it: a signal came."""
        if self._loop is None or self._is_asked:
            super().handle_exit(sig, frame)
            return
        self._is_asked = True
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        say(logging.INFO, f"ending: running jobs have {self._seconds:g} s")
        try:
            await self._dispatcher.drain(self._seconds)
        finally:
            self.should_exit = True
