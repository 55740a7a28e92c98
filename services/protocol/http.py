"""What both applications are made from: one FastAPI set-up with the project's error answers and body bound."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from services.protocol.errors import InvalidInput, ServiceError
from services.protocol.limits import BodyLimit
from services.protocol.logs import HEADER, Observe, RequestLog, observe_nothing, request_id

logger = logging.getLogger(__name__)


def make_app(
    title: str,
    *,
    max_body_bytes: int,
    docs: bool,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    observe: Observe = observe_nothing,
) -> FastAPI:
    """An application without routes, whose every error answer is `{"error": message}`.

    Args:
        title: its name in the OpenAPI document.
        max_body_bytes: bound on the request body, compressed or not.
        docs: whether to serve the OpenAPI document and its pages.
        lifespan: runs around the serving.
        observe: told of every request that was answered.
    """
    paths = {"openapi_url": "/openapi.json", "docs_url": "/docs"} if docs else {"openapi_url": None, "docs_url": None}
    app = FastAPI(title=title, lifespan=lifespan, redirect_slashes=False, redoc_url=None, **paths)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(RequestLog, observe=observe)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    if error.status >= 500:
        logger.warning(
            "%s %s answered %d: %s", request.method, request.url.path, error.status, error.__cause__ or error
        )
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    """Errors of the framework itself: unknown paths, wrong methods, malformed forms."""
    assert isinstance(error, HTTPException)
    headers: Mapping[str, str] | None = error.headers
    return JSONResponse({"error": error.detail}, error.status_code, headers)


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return JSONResponse(InvalidInput(told).body(), InvalidInput.status)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """Says nothing about the inside; the traceback goes to the log, by the server, to which the framework re-raises."""
    logger.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    identity = request_id()  # which the middleware cannot add: this is answered outside of it
    return JSONResponse({"error": "internal error"}, 500, {HEADER: identity} if identity else None)
