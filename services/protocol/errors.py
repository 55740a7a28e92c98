"""Errors of the services and of everyone who talks to them: one class a meaning, each with its HTTP status.

ServiceError                  500
├── InvalidInput              400  what was sent is malformed, or does not fit the model
├── Unauthorized              401  the secret that this path asks for is missing, or another one
├── NotFound                  404  no such path or model
├── Conflict                  409  what was asked for does not go with the state that the service is in
├── TooLarge                  413  the body, or the image in it, is larger than allowed
├── UnsupportedMedia          415  a media type or content encoding that is not spoken here
├── Overloaded                429  too much work is waiting; come back after `retry_after` seconds
├── BudgetSpent               429  the client may cause no more victim queries, or not before `retry_after` seconds
├── RateLimited               429  the client sends faster than it may; come back after `retry_after` seconds
├── AttackSuspected           429  the client has sent many near-identical images; come back after `retry_after` seconds
├── ClientGone                499  the client hung up; nobody receives this
├── Unsupported               501  a part of the protocol that is not implemented
├── UpstreamUnreachable       502  the victim cannot be reached, or broke the connection
├── UpstreamInvalid           502  the victim answered something that is no answer
├── Unavailable               503  not ready; come back after `retry_after` seconds
├── CircuitOpen               503  the victim failed too often to be asked now; come back after `retry_after` seconds
├── UpstreamTimeout           504  the victim did not answer in time
└── DeadlineExceeded          504  the time that the client or the service gives a request is over

Every error answer of both services is `{"error": message}` with the status of its class. The victim's client raises the
same classes for the statuses that it receives (see `from_status`), so that a failure keeps its meaning over any number
of hops; 401 alone belongs to one hop.
"""

import math
from typing import ClassVar


class ServiceError(Exception):
    """Root of all errors of the services.

    Attributes:
        status: the HTTP status that answers it.
        message: what was wrong and what to do, fit to be shown to a client.
        retry_after: seconds after which a client may try again; None where that is no remedy or the time is unknown.
    """

    status: ClassVar[int] = 500

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """Keeps the message, and when to come back."""
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after

    def body(self) -> dict[str, str]:
        """The answer's JSON body."""
        return {"error": self.message}

    def headers(self) -> dict[str, str]:
        """The answer's own headers."""
        return {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}


class InvalidInput(ServiceError):  # noqa: N818 - the names say what happened; the root says that they are errors
    """What was sent is malformed, or does not fit the model."""

    status = 400


class Unauthorized(ServiceError):  # noqa: N818
    """The secret that this path asks for is missing, or another one."""

    status = 401

    def headers(self) -> dict[str, str]:
        """The answer's own headers."""
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class NotFound(ServiceError):  # noqa: N818
    """No such path or model."""

    status = 404


class Conflict(ServiceError):  # noqa: N818
    """What was asked for does not go with the state that the service is in."""

    status = 409


class TooLarge(ServiceError):  # noqa: N818
    """The body, or the image in it, is larger than allowed."""

    status = 413


class UnsupportedMedia(ServiceError):  # noqa: N818
    """A media type or content encoding that is not spoken here."""

    status = 415


class Overloaded(ServiceError):  # noqa: N818
    """Too much work is waiting already."""

    status = 429


class BudgetSpent(ServiceError):  # noqa: N818
    """The client may cause no more victim queries, or not so many at once, or not yet."""

    status = 429


class RateLimited(ServiceError):  # noqa: N818
    """The client sends more images a second than it may."""

    status = 429


class AttackSuspected(ServiceError):  # noqa: N818
    """The client has sent more near-identical images than ordinary clients do."""

    status = 429


class ClientGone(ServiceError):  # noqa: N818
    """The client hung up before its request or the answer was whole; the status is nginx's, for logs alone."""

    status = 499


class Unsupported(ServiceError):  # noqa: N818
    """A part of the protocol that is not implemented."""

    status = 501


class UpstreamUnreachable(ServiceError):  # noqa: N818
    """The victim cannot be reached, or broke the connection."""

    status = 502


class UpstreamInvalid(ServiceError):  # noqa: N818
    """The victim answered something that is no answer: not 200, malformed, of the wrong shape, or not finite."""

    status = 502


class Unavailable(ServiceError):  # noqa: N818
    """The service is not ready."""

    status = 503


class CircuitOpen(ServiceError):  # noqa: N818
    """The victim failed so often in a row that it was not asked."""

    status = 503


class UpstreamTimeout(ServiceError):  # noqa: N818
    """The victim did not answer in time."""

    status = 504


class DeadlineExceeded(ServiceError):  # noqa: N818
    """The time that the client or the service gives a request is over."""

    status = 504


TRANSIENT = (Overloaded, Unavailable, UpstreamUnreachable, UpstreamTimeout)
"""The failures that may pass by themselves: the same request may succeed later."""

_BY_STATUS: dict[int, type[ServiceError]] = {
    kind.status: kind
    for kind in (
        InvalidInput,
        NotFound,
        Conflict,
        TooLarge,
        UnsupportedMedia,
        Overloaded,
        Unsupported,
        UpstreamUnreachable,
        Unavailable,
        UpstreamTimeout,
    )
}


def from_status(status: int, message: str, *, retry_after: float | None = None) -> ServiceError:
    """The error that an answer with this status means.

    A status without a class of its own is `UpstreamInvalid`, and so is 401: a secret is a matter of one hop, and
    whoever asked us is not to be told that theirs is wrong when the victim refuses ours.
    """
    return _BY_STATUS.get(status, UpstreamInvalid)(message, retry_after=retry_after)
