"""Requests to the replicas of one victim: sent to the one that fares best, and again as far as patience goes."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence

import httpx

from services.protocol import deadlines, logs
from services.protocol.errors import (
    TRANSIENT,
    CircuitOpen,
    Unavailable,
    UpstreamTimeout,
    UpstreamUnreachable,
    from_status,
)
from services.protocol.replicas import BACKOFF_FIRST_S, Replica
from services.protocol.roster import Roster

CONNECT_TIMEOUT_S = 5.0
"""How long a replica is given at most to take a connection, and to tell its health."""

_WORDS_LENGTH = 500
_SHORT = 6
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
_NOT_READY = (UpstreamUnreachable.status, Unavailable.status, UpstreamTimeout.status)
_NO_SUCH_PATH = (404, 405, 501)
_TRITON_NOT_READY = 400


class ReplicaPool:
    """Sends requests to replicas; each goes to the one with the fewest requests outstanding.

    Args:
        replicas: at least one.
        headers: sent with every request; never logged.
        in_flight: connections kept open.
        timeout_s: seconds without progress after which a request has timed out.
        patience_s: as `AsyncVictimClient` has it.
        on_resend: as `AsyncVictimClient` has it.
        transport: in place of the network, for tests.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        headers: Mapping[str, str],
        in_flight: int,
        timeout_s: float,
        patience_s: float,
        on_resend: Callable[[int], None] | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        """Opens no connection yet."""
        self._roster = Roster(replicas)
        self._patience_s = patience_s
        self._on_resend = on_resend
        # "Bearer" may be told, and so may what is too short to be a secret.
        parts = {part for value in headers.values() for part in (value, *value.split()) if len(part) > _SHORT}
        self._secrets = sorted(parts, key=len, reverse=True)
        self._last_success = time.monotonic()
        self._quick_s = min(timeout_s, CONNECT_TIMEOUT_S)
        # An idle connection is given up sooner than the 5 seconds after which common servers close it: a request that
        # meets such a close fails. Waiting for a free connection has no limit, the caller's semaphore sees to that.
        self._http = httpx.AsyncClient(
            headers=dict(headers),
            timeout=httpx.Timeout(timeout_s, connect=self._quick_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=in_flight, keepalive_expiry=2.0),
            transport=transport,
        )

    @property
    def replicas(self) -> int:
        """How many are known now."""
        return len(self._roster.replicas)

    async def post(self, body: bytes, headers: dict[str, str], *, count: int) -> httpx.Response:
        """Sends `count` images, again and again as far as patience goes; returns an answer with status 200."""
        return await self._exchange(
            lambda replica: replica.request(self._http, "POST", replica.url, content=body, headers=headers), count
        )

    async def get(self, where: Callable[[Replica], str]) -> httpx.Response:
        """Asks for what costs no query, with the same patience; returns an answer with status 200."""
        return await self._exchange(lambda replica: replica.request(self._http, "GET", where(replica)), 0)

    async def ready(self) -> bool:
        """Whether any replica says that it is ready."""
        await self._roster.refresh()
        replicas = self._roster.replicas
        told = await asyncio.gather(*(self._health(replica) for replica in replicas))
        return any(status == 200 or (one.lenient and status < 500) for one, status in zip(replicas, told, strict=True))

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def _exchange(self, make: Callable[[Replica], httpx.Request], count: int) -> httpx.Response:
        paid = True  # the first transmission is accounted for by the caller
        failing_since: float | None = None
        await self._roster.refresh()
        replica = self._best()
        self._check_breaker(replica)
        while True:
            if count and not paid and self._on_resend is not None:
                self._on_resend(count)
            started = time.monotonic()
            try:
                return await self._attempt(replica, make(replica))
            except TRANSIENT as error:
                paid = isinstance(error.__cause__, _NOT_SENT)
                now = time.monotonic()
                replica.failed(now, started=started, error=error)
                # Who waited for a time-out once, and has no patience, shall not wait for another one.
                at_once = failing_since is None and not isinstance(error, UpstreamTimeout)
                failing_since = failing_since or now
                recovered = await self._recovered(failing_since, at_once=at_once)
                if recovered is None:
                    raise
                replica = recovered

    def _check_breaker(self, best: Replica) -> None:
        """Fails at once where even the best replica's breaker is tripped; patience is for waiting, and waits.

        Raises:
            CircuitOpen: it is.
        """
        now = time.monotonic()
        if not self._patience_s and best.tripped(now):
            raise CircuitOpen(
                f"the victim at {best.url} failed {best.failures} times in a row, and is given a rest",
                retry_after=max(best.rests_until - now, BACKOFF_FIRST_S),
            )

    async def _recovered(self, failing_since: float, *, at_once: bool) -> Replica | None:
        """The replica to send to after a failure; None: patience has ended.

        Args:
            failing_since: when the request failed first.
            at_once: whether a replica that need not rest is asked even without patience.
        """
        while True:
            now = time.monotonic()
            deadline = max(failing_since, self._last_success) + self._patience_s
            if now >= deadline and not (at_once and self._best().rests_until <= now):
                return None
            at_once = False
            replica = await self._rested(deadline)
            started = time.monotonic()
            if replica.overloaded or await self._health(replica) not in _NOT_READY:
                return replica
            replica.failed(time.monotonic(), started=started, error=None)

    async def _rested(self, deadline: float) -> Replica:
        """Waits for a replica to have rested, and not beyond the deadline."""
        while True:
            await self._roster.refresh()
            replica = self._best()
            now = time.monotonic()
            if now >= min(replica.rests_until, deadline):
                return replica
            await asyncio.sleep(min(replica.rests_until, deadline) - now)

    def _best(self) -> Replica:
        """The replica to ask next; among equals, any."""
        now = time.monotonic()
        return min(self._roster.replicas, key=lambda one: (one.rank(now), random.random()))

    async def _health(self, replica: Replica) -> int:
        """The status that the replica's health answers with; 502 where nothing answers.

        Where a server has the model, but no health of models, it is the server's own.
        """
        status = await self._status(replica, replica.health)
        if replica.server is None:
            return status
        if status in _NO_SUCH_PATH and await self._status(replica, replica.server.model) == 200:
            status = await self._status(replica, replica.server.health)
        return Unavailable.status if status == _TRITON_NOT_READY else status

    async def _status(self, replica: Replica, url: str) -> int:
        try:
            return (await self._http.send(replica.request(self._http, "GET", url, timeout=self._quick_s))).status_code
        except Exception:  # as in `_attempt`
            return UpstreamUnreachable.status

    async def _attempt(self, replica: Replica, request: httpx.Request) -> httpx.Response:
        """Sends one request once; everything but an answer with status 200 is raised."""
        request.headers.update({**deadlines.travelling(), **logs.travelling()})
        replica.outstanding += 1
        try:
            response = await self._http.send(request)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise UpstreamTimeout(f"the victim at {request.url} did not answer in time") from error
        # Not httpx's own errors alone: where a connection breaks while it is made, AnyIO fails with an AttributeError.
        except Exception as error:
            raise UpstreamUnreachable(f"the victim at {request.url} cannot be reached: {error}") from error
        finally:
            replica.outstanding -= 1
        if response.status_code == 200:
            self._last_success = time.monotonic()
            replica.succeeded()
            return response
        message = f"the victim at {request.url} answered {response.status_code}: {self._words(response)}"
        raise from_status(response.status_code, message, retry_after=_seconds(response.headers.get("Retry-After")))

    def _words(self, response: httpx.Response) -> str:
        """What an error answer says, whatever its form; without the headers' values, should it repeat them."""
        try:
            words = str(response.json()["error"])
        except (ValueError, LookupError, TypeError):
            words = response.text or response.reason_phrase
        for secret in self._secrets:
            words = words.replace(secret, "***")
        return words[:_WORDS_LENGTH]


def _seconds(retry_after: str | None) -> float | None:
    """The header's number of seconds; dates are not understood and count as absent."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
