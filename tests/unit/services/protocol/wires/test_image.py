import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request

from services.protocol.client import AsyncVictimClient, HTTPVictim
from services.protocol.decoding.pool import DecodingPool
from services.protocol.errors import InvalidInput, Overloaded, UpstreamInvalid
from services.protocol.images import decode_image
from services.protocol.mapping import Mapping
from services.protocol.masks import encode_mask
from services.protocol.requests import read_request
from services.protocol.wires.image import encode_upload

URL = "http://victim:8000"


def levels(count: int, channels: int = 1) -> np.ndarray:
    """Images (count,channels,4,4), each filled with a level of its own among 256."""
    numbers = np.arange(count, dtype=np.float32)[:, None, None, None] / 255
    return np.broadcast_to(numbers, (count, channels, 4, 4)).astype(np.float32)


def uploaded(request: httpx.Request, channels: int = 1) -> np.ndarray:
    """The image in the form, as a victim would see it."""
    assert request.headers["Content-Type"].startswith("multipart/form-data; boundary=")
    png = request.content.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
    return decode_image(png, channels=channels, size=(4, 4))


def told(**answer: Any) -> httpx.Response:
    return httpx.Response(200, json=answer)


def masked(classes: np.ndarray, count: int = 2) -> str:
    """The mask of these classes (H,W), as it stands in JSON."""
    return base64.b64encode(encode_mask(classes.astype(np.uint8), count)).decode()


def scoring(request: httpx.Request) -> httpx.Response:
    if request.method == "GET":
        return httpx.Response(200)
    level = float(uploaded(request).mean())
    return told(label="a", labels=["a", "b"], probabilities=[level, 1 - level])


def naming(request: httpx.Request) -> httpx.Response:
    return told(label="c" if uploaded(request).mean() > 0.1 else "a", labels=["a", "b", "c"])


def client(handler: Any, **options: Any) -> AsyncVictimClient:
    return AsyncVictimClient([URL], wire="image", transport=httpx.MockTransport(handler), **options)


@pytest.mark.anyio
@pytest.mark.parametrize("channels", [1, 3])
async def test_the_form_is_what_a_web_framework_reads(channels: int) -> None:
    app = FastAPI()
    seen: list[np.ndarray] = []

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, str]:
        seen.append((await read_request(request, (channels, 4, 4), DecodingPool(1), max_body_bytes=10**6)).images)
        return {}

    image = np.random.default_rng(0).random((channels, 4, 4), dtype=np.float32)
    body, headers = encode_upload(image)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.post("/predict", content=body, headers=headers)
    assert response.status_code == 200, response.text
    np.testing.assert_allclose(seen[0][0], np.rint(image * 255) / 255, atol=1e-6)


@pytest.mark.anyio
async def test_every_image_travels_by_itself_and_the_scores_keep_their_order() -> None:
    async with client(scoring, in_flight=5, batch=64) as victim:
        scores = await victim.infer(levels(40))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, 0], np.arange(40) / 255, atol=1e-6)


@pytest.mark.anyio
async def test_labels_without_probabilities_become_one_hot() -> None:
    async with client(naming) as victim:
        scores = await victim.infer(levels(40)[20:30])
    assert scores.argmax(1).tolist() == [0] * 6 + [2] * 4
    assert scores.sum(1).tolist() == [1.0] * 10


@pytest.mark.anyio
async def test_masks_come_back_as_scores_of_every_pixel_in_order() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return told(labels=["background", "polyp"], mask=masked((uploaded(request)[0] > 0.5).astype(int)))

    batch = np.random.default_rng(0).random((9, 1, 4, 4), dtype=np.float32)
    async with client(handler, in_flight=5) as victim:
        scores = await victim.infer(batch)
    assert scores.shape == (9, 2, 4, 4)
    assert np.array_equal(scores.argmax(1), np.rint(batch[:, 0] * 255) > 127.5)
    assert np.array_equal(scores.sum(1), np.ones((9, 4, 4)))


@pytest.mark.anyio
async def test_answers_that_turn_from_labels_to_masks_are_invalid() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        one = {"label": "a"} if uploaded(request).mean() == 0 else {"mask": masked(np.zeros((4, 4), int))}
        return told(labels=["a", "b"], **one)

    async with client(handler) as victim:
        with pytest.raises(UpstreamInvalid, match="scores images or pixels"):
            await victim.infer(levels(2))


@pytest.mark.anyio
async def test_classes_that_change_their_order_are_an_invalid_answer() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        names = ["a", "b"] if uploaded(request).mean() == 0 else ["b", "a"]
        return told(label="a", labels=names)

    async with client(handler) as victim:
        with pytest.raises(UpstreamInvalid, match="changed its classes, or their order"):
            await victim.infer(levels(2))


@pytest.mark.anyio
async def test_overload_is_waited_out_and_only_the_image_sent_again_is_counted() -> None:
    resent: list[int] = []
    left = 2

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal left
        if request.method == "POST" and uploaded(request).mean() > 0 and left:
            left -= 1
            return httpx.Response(503)
        return scoring(request)

    async with client(handler, patience_s=30, on_resend=resent.append) as victim:
        assert len(await victim.infer(levels(6))) == 6
    assert resent == [1, 1]
    async with client(lambda _: httpx.Response(429, json={"error": "busy"})) as victim:
        with pytest.raises(Overloaded, match="busy"):
            await victim.infer(levels(1))
    async with client(lambda _: httpx.Response(400, json={"error": "not a scan"})) as victim:
        with pytest.raises(InvalidInput, match="not a scan"):
            await victim.infer(levels(1))


def test_the_synchronous_client_speaks_images_too_also_when_it_asks_for_names() -> None:
    with HTTPVictim([URL], wire="image", transport=httpx.MockTransport(naming)) as victim:
        images = torch.from_numpy(levels(30)[24:28].copy())
        assert victim(images).argmax(1).tolist() == [0, 0, 2, 2]
        assert json.dumps(victim.describe(images[0])) == '{"label": "a", "labels": ["a", "b", "c"]}'


def mapped(handler: Any, url: str = "http://elsewhere/models/scan:classify", **content: Any) -> AsyncVictimClient:
    """A client of somebody else's endpoint."""
    mapping = Mapping.model_validate({"answer": {"scores": "p"}, **content})
    return AsyncVictimClient([url], mapping=mapping, transport=httpx.MockTransport(handler))


def in_form(request: httpx.Request) -> bytes:
    assert b'name="scan"; filename="image.png"' in request.content
    return request.content.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]


def in_body(request: httpx.Request) -> bytes:
    assert request.headers["Content-Type"] == "image/png"
    return request.content


def in_json(request: httpx.Request) -> bytes:
    assert request.headers["Content-Type"] == "application/json"
    sent = json.loads(request.content)
    assert sent["options"] == {"top": 2, "all": True, "none": None}
    head, _, image = sent["inputs"][0]["url"].partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(image, validate=True)


TEMPLATE = {
    "options": {"top": 2, "all": True, "none": None},
    "inputs": [{"url": "data:image/png;base64,{image}"}],
}


@pytest.mark.parametrize(
    ("sending", "image_of"),
    [({"form": "scan"}, in_form), ({"body": "image/png"}, in_body), ({"json": TEMPLATE}, in_json)],
)
@pytest.mark.anyio
async def test_a_mapping_says_how_an_image_is_sent_and_where_its_scores_are(sending: Any, image_of: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://elsewhere/models/scan:classify"
        assert request.headers["X-Key"] == "k"
        level = float(decode_image(image_of(request), channels=3, size=(4, 4)).mean())
        return httpx.Response(200, json=[{"b": 1 - level, "a": level}])

    content = {"image": sending, "headers": {"X-Key": "k"}, "answer": {"scores": "0"}, "labels": ["a", "b"]}
    async with mapped(handler, **content) as victim:
        scores = await victim.infer(levels(9, channels=3))
        np.testing.assert_allclose(scores[:, 0], np.arange(9) / 255, atol=1e-6)
        described = await victim.describe(levels(1, channels=3)[0])
    assert described == {"label": "b", "labels": ["a", "b"], "probabilities": [0.0, 1.0]}


@pytest.mark.anyio
async def test_what_a_mapped_segmenter_says_is_told_in_this_projects_form() -> None:
    plane = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)

    def handler(_: httpx.Request) -> httpx.Response:
        return told(p=plane.tolist())

    async with mapped(handler, image={"form": "file"}, answer={"mask": "p"}) as victim:
        scores = await victim.infer(levels(2))
        described = await victim.describe(levels(1)[0])
    assert np.array_equal(scores, np.broadcast_to(np.stack([1 - plane, plane]), (2, 2, 4, 4)))
    assert described == {"labels": ["0", "1"], "mask": masked(plane > 0.5)}


@pytest.mark.anyio
async def test_a_mapping_of_an_endpoint_outranks_what_its_url_looks_like() -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return told(p=[0.5, 0.5])

    async with mapped(handler, "http://elsewhere/v2/models/m", image={"form": "file"}) as victim:
        await victim.infer(levels(1))
    assert asked == ["/v2/models/m"]


@pytest.mark.parametrize(
    ("status", "health", "ready"),
    [(200, None, True), (404, None, True), (500, None, False), (503, None, False), (404, "/up", False)],
)
@pytest.mark.anyio
async def test_where_nothing_is_known_of_its_health_any_answer_of_the_host_will_do(
    status: int, health: str | None, ready: bool
) -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        assert request.headers["X-Key"] == "k"
        return httpx.Response(status)

    async with mapped(handler, image={"form": "file"}, headers={"X-Key": "k"}, health=health) as victim:
        assert await victim.ready() is ready
    assert asked == [f"http://elsewhere{health or '/'}"]


@pytest.mark.anyio
async def test_labels_of_a_mapping_name_what_a_victim_of_our_own_form_does_not() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return told(label="b" if uploaded(request).mean() > 0 else "a")

    async with client(handler, mapping=Mapping(labels=("a", "b"))) as victim:
        assert (await victim.infer(levels(2))).tolist() == [[1, 0], [0, 1]]
        assert (await victim.describe(levels(2)[1]))["label"] == "b"


def test_no_error_tells_a_header_even_if_the_victim_does() -> None:
    content = {"image": {"form": "file"}, "answer": {"scores": "p"}, "headers": {"Authorization": "Bearer s3cret-key"}}
    mapping = Mapping.model_validate(content)
    for answer in (
        httpx.Response(401, json={"error": "s3cret-key is no key"}),
        httpx.Response(403, content=b"<p>you sent: Bearer s3cret-key"),
        told(q=1),
    ):
        transport = httpx.MockTransport(lambda _, answer=answer: answer)
        with (
            HTTPVictim([URL], mapping=mapping, transport=transport) as victim,
            pytest.raises(UpstreamInvalid) as caught,
        ):
            victim(torch.zeros(1, 1, 4, 4))
        assert "s3cret" not in str(caught.value)
