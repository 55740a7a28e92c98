import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request

from services.protocol.calls import read_call
from services.protocol.client import AsyncVictimClient, HTTPVictim
from services.protocol.errors import InvalidInput, Overloaded, UpstreamInvalid
from services.protocol.images import decode_image
from services.protocol.masks import encode_mask
from services.protocol.uploads import encode_upload, read_told

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
        seen.append((await read_call(request, (channels, 4, 4), max_body_bytes=10**6)).images)
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


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "no probabilities, mask or label, but nothing"),
        (b'{"score": 1}', "but 'score'"),
        (b'{"mask": null}', "no probabilities, mask or label, but 'mask'"),
        (b'{"label": "a"}', "is the label 'a' alone.* in `labels`"),
        (b'{"label": "a", "labels": ["b", "c"]}', "none of its `labels`"),
        (b'{"label": "a", "labels": ["a"]}', "two or more different"),
        (b'{"label": "a", "labels": ["a", "a"]}', "two or more different"),
        (b'{"label": "a", "labels": "ab"}', "no list of names"),
        (b'{"labels": ["a", "b"], "probabilities": [1, 0, 0]}', "3 probabilities for 2 labels"),
        (b'{"probabilities": {"a": 1}}', "no list of numbers"),
        (b'{"probabilities": []}', "no list of numbers"),
        (b'{"probabilities": ["1", "0"]}', "no list of numbers"),
        (b'{"probabilities": [true, false]}', "no list of numbers"),
        (b'{"probabilities": [NaN, 0]}', "not finite"),
        (b'{"probabilities": [1e300, 0]}', "not finite"),
        (b'{"probabilities": [1' + 400 * b"0" + b", 0]}", "not finite"),
    ],
)
def test_what_is_no_answer_to_an_image_is_refused_in_words(answer: bytes, message: str) -> None:
    with pytest.raises(UpstreamInvalid, match=message):
        read_told(answer, size=(4, 4))


def test_probabilities_need_no_labels_and_outrank_a_mask_which_outranks_a_label() -> None:
    def read(**answer: Any) -> tuple[list[float], tuple[str, ...] | None]:
        one = read_told(json.dumps(answer).encode(), size=(1, 2))
        return one.scores.tolist(), one.labels

    assert read(probabilities=[0.25, 0.75]) == ([0.25, 0.75], None)
    every = {"label": "a", "labels": ["a", "b"], "mask": masked(np.array([[0, 1]])), "probabilities": [0.25, 0.75]}
    assert read(**every) == ([0.25, 0.75], ("a", "b"))
    every["probabilities"] = None
    assert read(**every) == ([[[1.0, 0.0]], [[0.0, 1.0]]], ("a", "b"))
    every["mask"] = None
    assert read(**every) == ([1.0, 0.0], ("a", "b"))


@pytest.mark.parametrize("count", [2, 3])
def test_a_mask_becomes_one_hot_at_every_pixel(count: int) -> None:
    classes = np.random.default_rng(0).integers(0, count, (5, 7))
    labels = ["background", "polyp", "tool"][:count]
    content = json.dumps({"labels": labels, "lesion_fraction": 0.5, "mask": masked(classes, count)}).encode()
    one = read_told(content, size=(5, 7))
    assert one.labels == tuple(labels)
    assert one.scores.dtype == np.float32
    assert np.array_equal(one.scores, np.eye(count)[classes].transpose(2, 0, 1))


HEAD = '{"labels": ["a", "b"], "mask": '


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"mask": "aaaa"}', "a mask whose classes are unknown.* in `labels`"),
        ('{"mask": "aaaa", "labels": ["a"]}', "two or more different"),
        (HEAD + "[[0, 1]]}", "`mask` is no PNG in base64"),
        (HEAD + '"data:image/png;base64,aaaa"}', "`mask` is no base64"),
        (HEAD + '"aaa"}', "`mask` is no base64"),
        (HEAD + '"\u00e4\u00e4\u00e4\u00e4"}', "`mask` is no base64"),
        (HEAD + '""}', "the mask is empty"),
        (HEAD + '"aaaa"}', "the mask is no PNG"),
        (f'{HEAD}"{masked(np.zeros((4, 5), int))}"}}', "the mask has 5 x 4 pixels; at most 16"),
        (f'{HEAD}"{masked(np.zeros((3, 4), int))}"}}', "the mask has 4 x 3 pixels, the image 4 x 4"),
        (f'{HEAD}"{masked(np.ones((4, 4), int), 3)}"}}', "the value 128"),
    ],
)
def test_what_is_no_mask_of_the_image_is_refused_in_words(answer: str, message: str) -> None:
    with pytest.raises(UpstreamInvalid, match=message) as caught:
        read_told(answer.encode(), size=(4, 4))
    assert type(caught.value) is UpstreamInvalid


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
