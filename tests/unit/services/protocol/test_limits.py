import gzip
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia
from services.protocol.limits import BodyLimit, inflate


async def length(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


async def refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, TooLarge)
    return JSONResponse(error.body(), error.status)


def client(max_bytes: int) -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/", length, methods=["POST"])], exception_handlers={TooLarge: refuse})
    app.add_middleware(BodyLimit, max_bytes=max_bytes)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 4


@pytest.mark.anyio
async def test_bodies_up_to_the_bound_pass_declared_and_chunked() -> None:
    async with client(8) as http:
        assert (await http.post("/", content=b"x" * 8)).json() == 8
        assert (await http.post("/", content=chunks(2))).json() == 8
        assert (await http.post("/")).json() == 0


@pytest.mark.anyio
async def test_bodies_beyond_the_bound_are_answered_413_in_the_projects_form() -> None:
    async with client(8) as http:
        for content in (b"x" * 9, chunks(3)):
            response = await http.post("/", content=content)
            assert response.status_code == 413
            assert response.json() == {"error": "the request body is larger than the 8 bytes allowed"}


@pytest.mark.anyio
async def test_a_body_that_lies_about_its_length_is_counted() -> None:
    async with client(8) as http:
        response = await http.post("/", content=chunks(3), headers={"Content-Length": "1"})
        assert response.status_code == 413


@pytest.mark.anyio
@pytest.mark.parametrize(("declared", "status"), [(b"9" * 5000, 413), (b"\xb2", 200), (b"none", 200)])
async def test_a_declared_length_that_is_no_usable_number_is_no_crash(declared: bytes, status: int) -> None:
    async with client(8) as http:
        response = await http.post("/", content=b"x", headers={b"Content-Length": declared})
        assert response.status_code == status


def test_known_encodings_are_inflated() -> None:
    for encoding, body in ((None, b"abc"), ("identity", b"abc"), ("gzip", gzip.compress(b"abc"))):
        assert inflate(body, encoding, max_bytes=3) == b"abc"
    assert inflate(zlib.compress(b"abc"), " Deflate ", max_bytes=3) == b"abc"


def test_inflating_stops_at_the_bound() -> None:
    for encoding, body in (("gzip", gzip.compress(b"\0" * 10**7)), ("deflate", zlib.compress(b"\0" * 10**7))):
        with pytest.raises(TooLarge, match="inflated"):
            inflate(body, encoding, max_bytes=10**7 - 1)


def test_damaged_data_is_invalid() -> None:
    body = gzip.compress(b"abc" * 100)
    for damaged in (b"", b"abc", body[:-1], body + b"x"):
        with pytest.raises(InvalidInput, match="gzip"):
            inflate(damaged, "gzip", max_bytes=1000)


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "x" * 1000])
def test_other_encodings_are_unsupported(encoding: str) -> None:
    with pytest.raises(UnsupportedMedia):
        inflate(b"abc", encoding, max_bytes=1000)
