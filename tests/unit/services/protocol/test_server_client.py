"""The client against models of Open Inference Protocol servers, as they name and answer things."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from services.protocol import oip, replicas
from services.protocol.client import AsyncVictimClient
from services.protocol.errors import InvalidInput, NotFound, Unavailable, Unsupported, UpstreamInvalid
from services.protocol.mapping import Mapping

pytestmark = pytest.mark.anyio

URL = "http://server:8000/v2/models/m"


@pytest.fixture(autouse=True)
def _hardly_any_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BACKOFF_FIRST_S", 0.001)


def images(count: int) -> np.ndarray:
    """Images (count,1,2,2), each filled with its own number."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 1, 2, 2))


class Server:
    """A server of one model, m, that notes what it is asked; `overrides` answer in its place, by method and path."""

    def __init__(self, extensions: tuple[str, ...] = ("binary_tensor_data",), shape: tuple[int, ...] = (-1, 1, 2, 2)):
        self.extensions = extensions
        self.shape = shape
        self.asked: list[str] = []
        self.sizes: list[int] = []
        self.overrides: dict[str, Callable[[], httpx.Response]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        question = f"{request.method} {request.url.raw_path.decode()}"
        self.asked.append(question)
        if question in self.overrides:
            return self.overrides[question]()
        match question.removeprefix("GET "):
            case "/v2":
                return httpx.Response(200, json={"name": "s", "version": "1", "extensions": list(self.extensions)})
            case "/v2/models/m" | "/v2/models/m/versions/3":
                tensor = {"name": "x", "datatype": "FP32", "shape": list(self.shape)}
                return httpx.Response(200, json={"name": "m", "inputs": [tensor], "outputs": [{"name": "y"}]})
            case "/v2/models/m/ready" | "/v2/health/ready":
                return httpx.Response(200)
        if request.method == "GET":
            return httpx.Response(404, json={"error": "no such path"})
        sent = oip.decode_request(request.content, oip.header_length(request.headers.get(oip.HEADER)))
        self.sizes.append(len(sent.inputs[0].array))
        number = sent.inputs[0].array[:, 0, 0, :1]
        scores = np.concatenate([number, 1 - number], axis=1)
        output = (oip.Tensor("y", scores), sent.wanted(("y",))["y"])
        body, headers = oip.encode_response([output], model_name="m", model_version="1")
        return httpx.Response(200, content=body, headers=headers)

    def client(self, *urls: str, **options: Any) -> AsyncVictimClient:
        return AsyncVictimClient(urls or [URL], transport=httpx.MockTransport(self), **options)


@pytest.mark.parametrize("extensions", [("binary_tensor_data",), ()])
@pytest.mark.parametrize("ending", ["", "/", "/infer", "/versions/3", "/versions/3/infer"])
async def test_metadata_are_read_once_and_the_model_is_asked_as_they_say(
    ending: str, extensions: tuple[str, ...]
) -> None:
    server = Server(extensions)
    async with server.client(URL + ending, batch=3, in_flight=1) as victim:
        for _ in range(2):
            scores = await victim.infer(images(7))
            assert scores[:, 0].tolist() == list(range(7))
    model = "/v2/models/m/versions/3" if "versions" in ending else "/v2/models/m"
    assert server.asked == [f"GET {model}", "GET /v2", *[f"POST {model}/infer"] * 6]
    assert server.sizes == [3, 3, 1] * 2


async def test_calls_at_once_ask_for_the_metadata_once() -> None:
    server = Server()
    async with server.client(batch=1) as victim:
        await asyncio.gather(*(victim.infer(images(2)) for _ in range(5)))
    assert server.asked[:2] == ["GET /v2/models/m", "GET /v2"]
    assert len(server.asked) == 2 + 10


async def test_a_prefix_and_a_query_of_the_url_are_kept() -> None:
    server = Server()
    prefixed = {
        "GET /a/v2/models/m?key=1": "GET /v2/models/m",
        "GET /a/v2?key=1": "GET /v2",
        "POST /a/v2/models/m/infer?key=1": "POST /v2/models/m/infer",
        "GET /a/v2/models/m/ready": "GET /v2/models/m/ready",
    }

    def handler(request: httpx.Request) -> httpx.Response:
        method, _, path = prefixed[f"{request.method} {request.url.raw_path.decode()}"].partition(" ")
        copy = httpx.Request(method, f"http://server{path}", content=request.content, headers=request.headers)
        return server(copy)

    transport = httpx.MockTransport(handler)
    async with AsyncVictimClient(["http://server/a/v2/models/m/infer?key=1"], transport=transport) as victim:
        assert (await victim.infer(images(2))).shape == (2, 2)
        assert await victim.ready()


async def test_a_model_of_one_image_a_request_gets_one() -> None:
    server = Server(shape=(1, 1, 2, 2))
    async with server.client() as victim:
        assert (await victim.infer(images(3)))[:, 0].tolist() == [0, 1, 2]
    assert server.sizes == [1, 1, 1]


async def test_the_mapping_bounds_the_batch_of_a_server_whose_metadata_do_not() -> None:
    server = Server()
    async with server.client(mapping=Mapping.model_validate({"tensor": {"batch": 2}})) as victim:
        await victim.infer(images(5))
    assert server.sizes == [2, 2, 1]


async def test_what_the_model_does_not_take_is_refused_before_any_image_is_sent() -> None:
    server = Server(shape=(8, 1, 2, 2))
    async with server.client() as victim:
        with pytest.raises(Unsupported, match="exactly 8 images"):
            await victim.infer(images(3))
    server.shape = (-1, 3, 2, 2)
    async with server.client() as victim:
        with pytest.raises(InvalidInput, match=r"\[-1, 3, 2, 2\], these are \[N, 1, 2, 2\]"):
            await victim.infer(images(3))
    assert not any(question.startswith("POST") for question in server.asked)


@pytest.mark.parametrize("answer", [httpx.Response(404), httpx.Response(500), httpx.Response(200, content=b"<html>")])
async def test_a_server_without_metadata_of_its_own_gets_json(answer: httpx.Response) -> None:
    server = Server()
    server.overrides["GET /v2"] = lambda: answer
    async with server.client() as victim:
        assert (await victim.infer(images(2))).shape == (2, 2)


async def test_a_model_that_is_not_there_is_told_and_looked_for_again() -> None:
    server = Server()
    server.overrides["GET /v2/models/m"] = lambda: httpx.Response(404, json={"error": "Model m not found"})
    async with server.client(patience_s=30) as victim:
        with pytest.raises(NotFound, match="http://server:8000/v2/models/m answered 404: Model m not found"):
            await victim.infer(images(2))
        server.overrides["GET /v2/models/m"] = lambda: httpx.Response(200, content=b"<html>")
        with pytest.raises(UpstreamInvalid, match="no metadata"):
            await victim.infer(images(2))
        del server.overrides["GET /v2/models/m"]
        assert (await victim.infer(images(2))).shape == (2, 2)


async def test_a_server_that_is_away_is_waited_for_and_asking_for_metadata_costs_nothing() -> None:
    server = Server()
    left = 3

    def away() -> httpx.Response:
        nonlocal left
        left -= 1
        if not left:
            del server.overrides["GET /v2/models/m"]
        return httpx.Response(503)

    server.overrides["GET /v2/models/m"] = away
    resent: list[int] = []
    async with server.client(patience_s=30, on_resend=resent.append) as victim:
        assert (await victim.infer(images(5))).shape == (5, 2)
    assert resent == []
    assert server.sizes == [5]
    server.overrides["GET /v2"] = lambda: httpx.Response(503)
    async with server.client() as victim:
        with pytest.raises(Unavailable):
            await victim.infer(images(5))


READY = "GET /v2/models/m/ready"


@pytest.mark.parametrize(
    ("overrides", "ready", "asked"),
    [
        ({}, True, [READY]),
        ({READY: 503}, False, [READY]),
        ({READY: 400}, False, [READY]),  # Triton's word
        ({READY: 404}, True, [READY, "GET /v2/models/m", "GET /v2/health/ready"]),
        ({READY: 501}, True, [READY, "GET /v2/models/m", "GET /v2/health/ready"]),
        ({READY: 404, "GET /v2/health/ready": 503}, False, [READY, "GET /v2/models/m", "GET /v2/health/ready"]),
        ({READY: 404, "GET /v2/models/m": 404}, False, [READY, "GET /v2/models/m"]),
    ],
)
async def test_the_model_says_whether_it_is_ready_and_the_server_where_models_do_not(
    overrides: dict[str, int], ready: bool, asked: list[str]
) -> None:
    server = Server()
    server.overrides = {
        question: lambda status=status: httpx.Response(status) for question, status in overrides.items()
    }
    async with server.client() as victim:
        assert await victim.ready() is ready
    assert server.asked == asked


async def test_images_are_not_sent_again_while_triton_says_that_the_model_is_not_ready() -> None:
    server = Server()
    states = iter([400, 400, 200])
    server.overrides["GET /v2/models/m/ready"] = lambda: httpx.Response(next(states))
    fails = iter([True])

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and next(fails, False):
            return httpx.Response(503)
        return server(request)

    resent: list[int] = []
    transport = httpx.MockTransport(handler)
    async with AsyncVictimClient([URL], patience_s=30, on_resend=resent.append, transport=transport) as victim:
        await victim.infer(images(5))
    assert resent == [5]
    assert server.asked.count("GET /v2/models/m/ready") == 3


async def test_its_classes_are_numbered_unless_a_mapping_names_them() -> None:
    image = images(2)[1]
    server = Server()
    async with server.client() as victim:
        assert await victim.describe(image) == {"label": "0", "labels": ["0", "1"], "probabilities": [1.0, 0.0]}
    async with server.client(mapping=Mapping(labels=("a", "b"))) as victim:
        assert (await victim.describe(image))["labels"] == ["a", "b"]
        await victim.infer(images(3))
    async with server.client(mapping=Mapping(labels=("a", "b", "c"))) as victim:
        with pytest.raises(UpstreamInvalid, match="2 classes, for 3 labels"):
            await victim.infer(images(3))


async def test_headers_of_the_mapping_go_with_everything() -> None:
    server = Server()

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == "Bearer k"
        assert request.headers["Host"] == "m.hospital"
        return server(request)

    mapping = Mapping.model_validate({"headers": {"Authorization": "Bearer k", "Host": "m.hospital"}})
    async with AsyncVictimClient([URL], mapping=mapping, transport=httpx.MockTransport(handler)) as victim:
        assert await victim.ready()
        await victim.infer(images(2))


@pytest.mark.parametrize(
    ("urls", "options", "words"),
    [
        ([URL, "http://other"], {}, "replicas are alike"),
        ([URL], {"wire": "image"}, "takes tensors, not images"),
        (["http://h"], {"mapping": Mapping.model_validate({"tensor": {"output": "y"}})}, r"which \[tensor\] is about"),
    ],
)
def test_urls_and_wires_that_do_not_go_together_are_refused(urls: list[str], options: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        AsyncVictimClient(urls, **options)
