"""Which replicas a victim has now: the URLs that were given, and every address of a name that stands for several."""

import asyncio
import socket
import time
from collections.abc import Sequence

import httpx

from services.protocol.replicas import Replica

REFRESH_S = 5.0
"""Seconds after which a name is looked up again."""


async def addresses(host: str) -> tuple[str, ...]:
    """All addresses of a host, in order.

    Raises:
        OSError: it has none, or they cannot be asked for.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(sorted({str(entry[4][0]) for entry in found}))


class Roster:
    """The replicas of one victim, kept up to date.

    A URL that begins with dns+ stands for one replica an address (the instances of a scaled service, for example). As
    long as its name cannot be looked up, the addresses known last are used; before the first lookup, the name itself.

    Args:
        replicas: as the URLs were given, at least one.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        """Looks nothing up yet."""
        self._given = tuple(replicas)
        self._found: dict[str, tuple[Replica, ...]] = {}
        self._stale_at = 0.0 if any(one.is_name for one in replicas) else float("inf")

    @property
    def replicas(self) -> tuple[Replica, ...]:
        """Those that are known now; who failed stays the same object as long as its address remains."""
        return tuple(one for given in self._given for one in self._found.get(given.url, (given,)))

    async def refresh(self) -> None:
        """Looks names up that were not for a while; while one task waits for that, others go on with what is known."""
        now = time.monotonic()
        if now < self._stale_at:
            return
        self._stale_at = now + REFRESH_S
        for given in self._given:
            if given.is_name:
                await self._look_up(given)

    async def _look_up(self, given: Replica) -> None:
        try:
            found = await addresses(httpx.URL(given.url).host)
        except OSError:
            return
        known = {one.url: one for one in self._found.get(given.url, ())}
        now = [given.behind(address) for address in found]
        self._found[given.url] = tuple(known.get(one.url, one) for one in now)
