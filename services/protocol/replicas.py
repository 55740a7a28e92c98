"""The replicas of one victim: where each of them is, and how it fares."""

import math
import random
import re
from dataclasses import dataclass
from typing import Any, Self

import httpx

from services.protocol.errors import InvalidInput, Overloaded, ServiceError

BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 5.0

BREAKER_FAILURES = 3
"""Failures in a row, each after the rest that the one before brought, that trip a replica's circuit breaker."""

_BY_NAME = "dns+"
_MAX_DOUBLINGS = 16  # far beyond the last back-off; without a bound the power would overflow some day
_MODEL = re.compile(r"(?P<model>(?P<root>.*)/v2/models/[^/]+(?:/versions/[^/]+)?)(?:/infer)?")


@dataclass(frozen=True)
class ServerPaths:
    """What is known of a server from the URL of a model of it.

    Attributes:
        model: where the model's metadata are.
        server: where the server's metadata are.
        health: where the server, rather than the model, says whether it is ready.
    """

    model: str
    server: str
    health: str


@dataclass
class Replica:
    """One URL and how it fares.

    Attributes:
        url: where images are sent.
        health: where to ask, free of charge, whether it is ready.
        server: what it is if its URL names a model of an Open Inference Protocol server; None: any other endpoint.
        lenient: whether nothing is known of its health, so that every answer below 500 counts as ready.
        is_name: whether its host stands for as many replicas as it has addresses (`services.protocol.roster`).
        host: the name that it goes by, where its URL has an address instead.
        outstanding: requests sent and not answered yet.
        failures: how often in a row it failed.
        overloaded: whether its last failure was overload, which shows that it can be reached.
        rests_until: when it may be asked again, in seconds of the monotonic clock.
        failed_at: when its last failure was known, likewise.
    """

    url: str
    health: str
    server: ServerPaths | None = None
    lenient: bool = False
    is_name: bool = False
    host: str | None = None
    outstanding: int = 0
    failures: int = 0
    overloaded: bool = False
    rests_until: float = 0.0
    failed_at: float = -math.inf

    @classmethod
    def at(cls, url: str, *, foreign: bool = False, health: str | None = None) -> Self:
        """Reads a victim's URL: a bare host speaks at /predict, any other URL with a path is used as it is.

        A URL that ends in /v2/models/NAME, perhaps with /versions/V or /infer behind it, names a model of a server.
        One that begins with dns+http:// or dns+https:// stands for all addresses of its host.

        Args:
            url: the URL.
            foreign: whether it is an endpoint with ways of its own, even where its path looks like a model's.
            health: path at the same host that answers whether it is ready, if it is not the protocol's.

        Raises:
            InvalidInput: the URL is invalid.
        """
        is_name = isinstance(url, str) and url.startswith(_BY_NAME)
        try:
            parsed = httpx.URL(url[len(_BY_NAME) :] if is_name else url)
        except (httpx.InvalidURL, TypeError) as error:
            raise InvalidInput(f"{url!r} is no URL: {error}") from error
        port_fits = parsed.port is None or 0 < parsed.port < 2**16
        if parsed.scheme not in ("http", "https") or not parsed.host or not port_fits:
            raise InvalidInput(f"{url!r} is no URL of a victim; it must look like http://host:8000")
        path = parsed.path.rstrip("/")

        def sibling(other: str) -> str:
            return str(parsed.copy_with(path=other, query=None))

        named = None if foreign else _MODEL.fullmatch(path)
        if named:
            model, root = named["model"], named["root"]
            return cls(
                url=str(parsed.copy_with(path=f"{model}/infer")),
                health=sibling(health or f"{model}/ready"),
                server=ServerPaths(
                    model=str(parsed.copy_with(path=model)),
                    server=str(parsed.copy_with(path=f"{root}/v2")),
                    health=sibling(f"{root}/v2/health/ready"),
                ),
                is_name=is_name,
            )
        if foreign:
            own_health = "/"
        else:
            root = path.partition("/v2/")[0].removesuffix("/predict")
            own_health = f"{root}/v2/health/ready"
        return cls(
            url=str(parsed.copy_with(path=path or "/predict")),
            health=sibling(health or own_health),
            lenient=foreign and health is None,
            is_name=is_name,
        )

    def behind(self, address: str) -> Self:
        """One of the replicas that a name stands for: the same paths at that address, nothing known of how it fares."""

        def there(url: str) -> str:
            return str(httpx.URL(url).copy_with(host=address))

        paths = self.server
        return type(self)(
            url=there(self.url),
            health=there(self.health),
            server=paths and ServerPaths(there(paths.model), there(paths.server), there(paths.health)),
            lenient=self.lenient,
            host=httpx.URL(self.url).netloc.decode(),
        )

    def request(self, client: httpx.AsyncClient, method: str, url: str, **content: Any) -> httpx.Request:
        """A request to one of its URLs, under the name it goes by, which its certificate is for.

        Args:
            client: who will send it.
            method: GET or POST.
            url: one of its own.
            content: as `httpx.AsyncClient.build_request` takes it.
        """
        if self.host is not None:
            content["headers"] = {**content.get("headers", {}), "Host": self.host}
            content["extensions"] = {"sni_hostname": httpx.URL(f"//{self.host}").host}
        return client.build_request(method, url, **content)

    def rank(self, now: float) -> tuple[float, bool, int]:
        """Orders replicas: first those that have rested, then by load; a failing one takes one request on trial."""
        return max(self.rests_until - now, 0.0), self.failures > 0 and self.outstanding > 0, self.outstanding

    def tripped(self, now: float) -> bool:
        """Whether it failed so often in a row that nobody is to wait for it, but for one request on trial at a time.

        Overload is no such failure: it says itself when to come back, and answers some meanwhile.
        """
        often = self.failures >= BREAKER_FAILURES and not self.overloaded
        return often and (now < self.rests_until or self.outstanding > 0)

    def failed(self, now: float, *, started: float, error: ServiceError | None) -> None:
        """Rests: exponentially longer with every failure in a row, with jitter, and as long as the error asks for.

        Args:
            now: the time.
            started: when the question that failed was put; of many that fail together, the failures count as one.
            error: the answer; None: it was only asked for its health.
        """
        backoff = min(BACKOFF_FIRST_S * 2.0 ** min(self.failures, _MAX_DOUBLINGS), BACKOFF_LAST_S)
        pause = max(backoff * random.uniform(0.5, 1.0), (error and error.retry_after) or 0.0)
        self.failures += started > self.failed_at
        self.failed_at = now
        self.overloaded = isinstance(error, Overloaded)
        self.rests_until = max(self.rests_until, now + pause)

    def succeeded(self) -> None:
        """Forgets the failures; a rest that it asked for itself goes on."""
        self.failures = 0
