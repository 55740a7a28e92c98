"""What the tests of both services share: requests, answers, and an application without a socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from services.protocol import oip


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, inside its lifespan."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def tensor_request(array: np.ndarray, *, binary_output: bool = True) -> dict[str, Any]:
    """Arguments of a POST that sends the array in binary."""
    body, headers = oip.encode_request([oip.Tensor("x", array)], binary_output=binary_output)
    return {"content": body, "headers": headers}


def scores_of(response: httpx.Response) -> np.ndarray:
    """The scores in a tensor answer."""
    assert response.status_code == 200, response.text
    return oip.decode_response(response.content, oip.header_length(response.headers.get(oip.HEADER)))["probabilities"]


def assert_error(response: httpx.Response, status: int, *words: str) -> None:
    """The response is an error in the project's form, with these words in it."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    for word in words:
        assert word in response.json()["error"]
