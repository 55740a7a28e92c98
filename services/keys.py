"""API keys: who may ask, and how much at once.

A file of keys holds no secrets, only SHA-256 hashes. Keys are 256 random bits, so slow or salted hashes would add
nothing. The file is TOML, a table a client:

    [clinic-a]
    sha256 = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
    images_per_second = 50    # optional; by default the service's --rate
    burst = 200               # optional; how many at once after a pause, by default a second's

    python -m services.keys clinic-a --rate 50 >> keys.toml    # shows the key once, and adds its hash to the file

Clients send theirs as `X-API-Key: KEY` or `Authorization: Bearer KEY`.
"""

import hashlib
import hmac
import json
import math
import re
import secrets
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

from fastapi import Depends
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import Field
from pydantic_settings import CliPositionalArg

from services.protocol.errors import InvalidInput, RateLimited, Unauthorized
from services.settings import Config, read

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"sha256", "images_per_second", "burst"}

MAX_BUCKETS: Final = 20_000
"""Clients whose rate is remembered; beyond that, those that may send again anyway are forgotten."""


@dataclass(frozen=True)
class Rate:
    """How many images a client may send.

    Attributes:
        images_per_second: in the long run; None: any number.
        burst: at once, after a pause. Larger requests are also admitted then, and paid off before the next one.
    """

    images_per_second: float | None = None
    burst: int = 1

    @classmethod
    def of(cls, images_per_second: float | None, burst: float | None) -> Self:
        """With the burst of a second where none is given."""
        return cls(images_per_second, math.ceil(burst or images_per_second or 1))


@dataclass(frozen=True)
class Client:
    """Whom a key belongs to.

    Attributes:
        name: as in accounts, metrics and logs.
        digest: SHA-256 of the key in hexadecimal; empty without a file of keys.
        rate: its own; None: the service's.
    """

    name: str
    digest: str = ""
    rate: Rate | None = None


class Keys:
    """The clients that may ask."""

    def __init__(self, clients: Iterable[Client]) -> None:
        self._clients = tuple(clients)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file of keys. Raises InvalidInput, without quoting its values, if it is missing, invalid or empty."""
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise InvalidInput(f"the file of keys {path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # TOML or UTF-8; what it quotes might be a key that somebody put there in clear
            raise InvalidInput(f"the file of keys {path} is no TOML") from error
        if not tables:
            raise InvalidInput(f"{path} holds no key: make one with python -m services.keys NAME >> {path}")
        return cls(_client(path, name, table) for name, table in tables.items())

    def client(self, key: str | None) -> Client:
        """The key's client, found in constant time. Raises Unauthorized if there is none."""
        digest = _digest(key or "")
        found: Client | None = None
        for one in self._clients:
            if hmac.compare_digest(one.digest, digest):
                found = one
        if found is None:
            raise Unauthorized("an API key is needed: send 'X-API-Key: KEY' or 'Authorization: Bearer KEY'")
        return found


class Purses:
    """Token buckets that limit each client's rate, counted in images. Not thread-safe.

    Args:
        rate: of clients that have none of their own.
        clock: seconds, from any start.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._full_at: dict[str, float] = {}  # when the purse will be full again

    def take(self, name: str, images: int, own: Rate | None = None) -> None:
        """Takes a request's images from a client's bucket; `own` is its own rate, None the common one.

        Raises RateLimited if the bucket does not hold enough yet; nothing is taken then.
        """
        rate = own or self._rate
        if rate.images_per_second is None:
            return
        now = self._clock()
        full_at = max(self._full_at.get(name, now), now)
        # Who asks for more than a purse can hold may have it from a full one, and is in debt then.
        starts_at = full_at - (rate.burst - min(images, rate.burst)) / rate.images_per_second
        if starts_at > now:
            raise RateLimited(
                f"this client may send {rate.images_per_second:g} images a second, and {rate.burst} at once",
                retry_after=starts_at - now,
            )
        if len(self._full_at) >= MAX_BUCKETS:
            self._full_at = {one: at for one, at in self._full_at.items() if at > now}
        self._full_at[name] = full_at + images / rate.images_per_second


class Access:
    """Who may ask, and how fast.

    Args:
        keys: the clients; None: anybody may ask, and keys are names that tell clients apart.
        rate: of clients that have none of their own.
        name_of: the client's name for a key that is a name.
    """

    def __init__(self, keys: Keys | None, rate: Rate, name_of: Callable[[str | None], str]) -> None:
        self._keys = keys
        self._name_of = name_of
        self._purses = Purses(rate)

    def client(self, key: str | None) -> Client:
        """Who asks, determined before the body is read. Raises Unauthorized if they may not."""
        return Client(self._name_of(key)) if self._keys is None else self._keys.client(key)

    def take(self, client: Client, images: int) -> None:
        """Counts what a client sends. Raises RateLimited if it sends too fast."""
        self._purses.take(client.name, images, client.rate)


_header: Final = APIKeyHeader(name="X-API-Key", auto_error=False, description="The client's key.")
_bearer: Final = HTTPBearer(auto_error=False, description="The client's key, likewise.")


async def _sent(
    header: Annotated[str | None, Depends(_header)],
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str | None:
    return header or (bearer.credentials if bearer else None)


KeySent = Annotated[str | None, Depends(_sent)]
"""An argument that is the key of the request; None: it has none."""


def make_key(name: str, rate: float | None = None, burst: int | None = None) -> tuple[str, str]:
    """Makes a client's key. Returns it and its table for the file of keys, which holds only the hash.

    Raises InvalidInput if the name or the rate is invalid.
    """
    key = secrets.token_urlsafe(32)
    fields = {"sha256": _digest(key), "images_per_second": rate, "burst": burst}
    table = {field: value for field, value in fields.items() if value is not None}
    _client("a new key", name, table)
    # What JSON says of strings and numbers, TOML says too.
    return key, "\n".join([f"[{name}]", *(f"{field} = {json.dumps(value)}" for field, value in table.items())])


class _NewKey(Config):
    """Makes an API key: what a file of keys needs goes to stdout, the key itself to stderr, once."""

    name: CliPositionalArg[str] = Field(description="the client's")
    rate: float | None = Field(None, description="images a second that the client may send (default: the service's)")
    burst: int | None = Field(None, description="images that it may send at once (default: a second's)")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m services.keys") -> int:
    """Runs the command; returns its exit code."""
    wanted = read(_NewKey, argv, prog=prog)
    try:
        key, table = make_key(wanted.name, wanted.rate, wanted.burst)
    except InvalidInput as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    print(f"{table}\n")
    print(f"The key of {wanted.name}, which nothing shows again: {key}", file=sys.stderr)
    return 0


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _client(where: object, name: str, table: Any) -> Client:
    def wrong(what: str) -> InvalidInput:
        return InvalidInput(f"{where}: [{name[:64]}] {what}")

    if not _NAME.fullmatch(name) or not isinstance(table, dict):
        raise wrong("is no table of a client, whose name has letters, digits, - and _")
    if set(table) - _FIELDS:
        raise wrong(f"has fields that are not known here; there are {', '.join(sorted(_FIELDS))}")
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise wrong("needs sha256, 64 hexadecimal digits in lower case")
    rate, burst = table.get("images_per_second"), table.get("burst")
    for value in (rate, burst):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise wrong("has an images_per_second or a burst that is no number above 0")
    if rate is None:
        if burst is not None:
            raise wrong("has a burst, and no images_per_second that it would belong to")
        return Client(name, digest)
    return Client(name, digest, Rate.of(float(rate), burst))


if __name__ == "__main__":
    sys.exit(main())
