"""Bounds on what a client may make the services hold in memory."""

import zlib

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class BodyLimit:
    """ASGI middleware that bounds the request body, by what is declared and by what arrives.

    FastAPI has such a bound itself, but answers it in plain text that no exception handler sees. Here a declared length
    beyond the bound is answered at once; a chunked body raises `TooLarge` where the application reads it, for the
    application's own handlers to answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Wraps `app`."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("Content-Length", "")
        # Longer than any true length, a number is not even parsed: Python refuses to beyond some thousand digits.
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > self._max_bytes):
            error = self._error()
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._error()
            return message

        await self._app(scope, bounded, send)

    def _error(self) -> TooLarge:
        return TooLarge(f"the request body is larger than the {self._max_bytes} bytes allowed")


def inflate(body: bytes, encoding: str | None, *, max_bytes: int) -> bytes:
    """Undoes a request's Content-Encoding.

    Args:
        body: the body as received.
        encoding: the header's value; None or "identity": the body is returned as it is.
        max_bytes: bound on the result.

    Raises:
        InvalidInput: the compressed data is damaged, cut short, or followed by something else.
        TooLarge: the result exceeds the bound.
        UnsupportedMedia: neither gzip nor deflate.
    """
    coding = (encoding or "identity").strip().lower()
    if coding == "identity":
        return body
    if coding not in _WINDOW_BITS:
        raise UnsupportedMedia(f"content encoding {coding[:40]!r} is not supported; use gzip, deflate or none")
    stream = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        data = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise InvalidInput(f"the body is no valid {coding} data: {error}") from error
    if len(data) > max_bytes:
        raise TooLarge(f"the inflated request body is larger than the {max_bytes} bytes allowed")
    if not stream.eof or stream.unused_data:
        raise InvalidInput(f"the {coding} data is cut short or followed by something else")
    return data
