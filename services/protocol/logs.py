"""Logs: one line an event, as text or as JSON, each with the id of the request that it belongs to.

A request's id is what the client sends as `X-Request-ID`, or a new one. It is in every line, in the answer, and travels
on to the victim, so that one search finds a request in the logs of both services.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogFormat = Literal["text", "json"]

HEADER: Final = "X-Request-ID"

_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s"
_UNKNOWN: Final = "unknown"  # the route of a path that there is not: paths are the clients' words
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

Observe = Callable[[str, int, float], None]
"""Takes a request's route, the status of its answer, and the seconds from its beginning to the answer's end."""

logger = logging.getLogger(__name__)


def observe_nothing(_route: str, _status: int, _seconds: float) -> None:
    """Ignores the request."""


def request_id() -> str | None:
    """The id of the request that this task handles; None: it handles none."""
    return _request_id.get()


def travelling() -> dict[str, str]:
    """The header that names the request to the next service; none where this task handles none."""
    identity = request_id()
    return {} if identity is None else {HEADER: identity}


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time (UTC), level, logger, message, request_id, and what `extra={"fields": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback is one of its strings, so that lines stay lines."""
        told: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def make_handler(form: LogFormat) -> logging.Handler:
    """What writes lines of that form to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    handler.addFilter(_add_request_id)
    return handler


def set_up(level: str, form: LogFormat) -> None:
    """Sends the logs of this process, from that level on, to stderr."""
    logging.basicConfig(level=level.upper(), handlers=[make_handler(form)])
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id() or "-"
    return True


class RequestLog:
    """ASGI middleware: gives every request its id, and logs it (level info) once it is answered: never its content.

    Args:
        app: what it is around.
        observe: told of every request that was answered.
    """

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        """Wraps `app`."""
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get(HEADER, "")
        identity = told if _ID.fullmatch(told) else uuid.uuid4().hex
        # Not taken back afterwards: every request is handled in a task of its own, and an unexpected error is answered
        # outside of all middleware.
        _request_id.set(identity)
        begun = time.perf_counter()
        status = 500

        async def signed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = identity
            await send(message)

        try:
            await self._app(scope, receive, signed)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", _UNKNOWN)
            self._observe(route, status, seconds)
            fields = {"method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1000, 2)}
            logger.info("%(method)s %(route)s %(status)d in %(ms).1f ms", fields, extra={"fields": fields})
