"""Whether the victim is ready, cached so that frequent health checks do not reach it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

FRESH_S: Final = 1.0
"""How long an answer counts, in seconds."""


class Readiness:
    """Caches the answer to `ask`, which is never called twice at once; `clock` gives seconds, from any start."""

    def __init__(self, ask: Callable[[], Awaitable[bool]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._answer = False
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def __call__(self) -> bool:
        """The answer, at most `FRESH_S` old when the call began."""
        called_at = self._clock()
        async with self._asking:
            if self._asked_at < called_at - FRESH_S:
                asked_at = self._clock()
                self._answer = await self._ask()
                self._asked_at = asked_at
            return self._answer
