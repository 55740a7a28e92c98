import base64
import gzip
import io
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
from dicom_files import dicom
from fastapi import FastAPI, Request
from fastapi.responses import Response
from PIL import Image

from services.protocol.decoding.pool import DecodingPool
from services.protocol.errors import InvalidInput, Unsupported
from services.protocol.masks import class_map, decode_mask
from services.protocol.requests import PredictRequest, read_request
from services.protocol.responses import Signature, respond

pytestmark = pytest.mark.anyio

SHAPE = (1, 8, 6)
LABELS = ["background", "polyp"]
SIGNATURE = Signature(
    model_name="m", model_version="1", labels=LABELS, extra={"artifact": {"id": "x"}}, headers={"X-Artifact-Id": "x"}
)
POLYP = np.linspace(0, 1, 48, dtype=np.float32).reshape(8, 6)
PROBABILITIES = np.stack([1 - POLYP, POLYP])


def picture(width: int, height: int, kind: str = "JPEG", orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format=kind, exif=exif)
    return buffer.getvalue()


def image_call(size: tuple[int, int] = (16, 24), *, wants_png: bool = False) -> PredictRequest:
    return PredictRequest(np.zeros((1, *SHAPE), np.float32), "image", size=size, wants_png=wants_png)


@pytest.fixture
async def read() -> AsyncIterator[Any]:
    """Posts, and returns the call that was read."""
    app = FastAPI()
    calls: list[PredictRequest] = []
    decoders = DecodingPool(1)

    @app.post("/")
    async def read_one(request: Request) -> None:
        calls.append(await read_request(request, SHAPE, decoders, max_body_bytes=10**7))

    transport = httpx.ASGITransport(app)
    async with decoders, httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def post(url: str = "/", **question: Any) -> PredictRequest:
            response = await http.post(url, **question)
            assert response.status_code == 200, response.text
            return calls[-1]

        yield post


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (200, 300)), (3, (200, 300)), (6, (300, 200)), (8, (300, 200))])
async def test_an_uploaded_image_is_remembered_by_its_size(
    read: Any, kind: str, orientation: int, size: tuple[int, int]
) -> None:
    data = picture(300, 200, kind, orientation)
    for question in ({"files": {"file": data}}, {"content": data, "headers": {"Content-Type": "image/*"}}):
        call = await read(**question)
        assert call.images.shape == (1, *SHAPE)
        assert (call.form, call.size) == ("image", size)


FRAMES = dicom(np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 12).reshape(5, 3, 4), frames=True)
DICOM_TYPE = {"Content-Type": "application/dicom"}


@pytest.mark.parametrize("media", ["application/dicom", "Application/DICOM; transfer-syntax=*", "image/png", "image/x"])
async def test_dicom_is_read_from_bodies_and_forms_by_its_content(read: Any, media: str) -> None:
    data = dicom(np.full((3, 4), 51, np.uint8))
    for question in (
        {"content": data, "headers": {"Content-Type": media}},
        {"content": gzip.compress(data), "headers": {"Content-Type": media, "Content-Encoding": "gzip"}},
        {"files": {"file": ("scan.jpg", data, media)}},
    ):
        call = await read(**question)
        assert call.images == pytest.approx(0.2)
        assert (call.form, call.size) == ("image", (3, 4))


async def test_a_dicom_type_may_have_another_image(read: Any) -> None:
    assert (await read(content=picture(4, 3), headers=DICOM_TYPE)).size == (3, 4)


async def test_a_frame_is_chosen_in_the_query_or_in_the_form(read: Any) -> None:
    for number in (1, 2, 5):
        for call in (
            await read(f"/?frame={number}", content=FRAMES, headers=DICOM_TYPE),
            await read(f"/?frame={number}", files={"file": FRAMES}),
            await read(files={"file": FRAMES}, data={"frame": str(number)}),
        ):
            assert call.images == pytest.approx((number - 1) * 50 / 255)


@pytest.mark.parametrize("frame", ["0", "-1", "+1", "1.0", "1e0", "one", "", " 1", "１", "9" * 5000])
async def test_what_is_no_number_of_a_frame_is_refused(read: Any, frame: str) -> None:
    with pytest.raises(InvalidInput, match="'frame' is one whole number, from 1"):
        await read("/?" + urlencode({"frame": frame}), content=FRAMES, headers=DICOM_TYPE)
    with pytest.raises(InvalidInput, match="'frame' is one whole number, from 1"):
        await read(files={"file": FRAMES}, data={"frame": frame})


async def test_a_frame_is_chosen_once_and_among_those_that_are(read: Any) -> None:
    with pytest.raises(InvalidInput, match="one whole number"):
        await read("/?frame=1&frame=1", content=FRAMES, headers=DICOM_TYPE)
    with pytest.raises(InvalidInput, match="one whole number"):
        await read("/?frame=1", files={"file": FRAMES}, data={"frame": "1"})
    with pytest.raises(InvalidInput, match="5 frames; choose one"):
        await read(content=FRAMES, headers=DICOM_TYPE)
    with pytest.raises(InvalidInput, match="from 1 to 5"):
        await read("/?frame=6", content=FRAMES, headers=DICOM_TYPE)


@pytest.mark.parametrize(
    ("accept", "wants_png"),
    [
        ("image/png", True),
        ("Image/PNG", True),
        ("image/*", True),
        ("image/png, */*;q=0.8", True),
        ("text/html, image/png ; q=0.5, application/json;q=0.499", True),
        ("image/png;level=1", True),
        ("image/png;q=wrong", True),
        ("*/*", False),
        ("", False),
        (",;,=", False),
        ("application/json", False),
        ("image/png, application/json", False),
        ("image/png, application/*", False),
        ("image/png;q=0.4, */*;q=0.5", False),
        ("image/png;q=0, image/*", False),
        ("image/png;q=0", False),
        ("image/jpeg", False),
        ("text/html", False),
    ],
)
async def test_a_png_is_wanted_where_it_is_more_welcome_than_json(read: Any, accept: str, wants_png: bool) -> None:
    for question in ({"files": {"file": picture(3, 2)}}, {"content": picture(3, 2)}):
        headers = {"Accept": accept} if "files" in question else {"Accept": accept, "Content-Type": "image/jpeg"}
        assert (await read(**question, headers=headers)).wants_png is wants_png


async def test_several_accept_headers_are_one_list(read: Any) -> None:
    headers = [("Accept", "text/html"), ("Accept", "image/png")]
    assert (await read(files={"file": picture(3, 2)}, headers=headers)).wants_png


@pytest.mark.parametrize("size", [(16, 24), (8, 6), (5, 3), (301, 200)])
async def test_an_image_is_answered_with_a_mask_of_its_own_size(size: tuple[int, int]) -> None:
    response = await respond(image_call(size), PROBABILITIES[None], SIGNATURE)
    assert isinstance(response, Response)
    told = httpx.Response(200, content=bytes(response.body)).json()
    classes = class_map(PROBABILITIES, size)
    assert 0 < classes.mean() < 1
    assert set(told) == {"labels", "lesion_fraction", "mask", "artifact"}
    assert told["labels"] == LABELS
    assert told["artifact"] == {"id": "x"}
    assert told["lesion_fraction"] == pytest.approx((classes > 0).mean(), abs=1e-12)
    assert np.array_equal(decode_mask(base64.b64decode(told["mask"]), 2, size), classes)
    assert response.headers["X-Artifact-Id"] == "x"
    assert response.headers["Content-Type"] == "application/json"


async def test_the_png_itself_is_the_same_mask_with_the_same_headers() -> None:
    response = await respond(image_call(wants_png=True), PROBABILITIES[None], SIGNATURE)
    assert response.headers["Content-Type"] == "image/png"
    assert response.headers["X-Artifact-Id"] == "x"
    assert np.array_equal(decode_mask(bytes(response.body), 2, (16, 24)), class_map(PROBABILITIES, (16, 24)))


async def test_every_class_but_the_first_is_lesion() -> None:
    scores = np.zeros((1, 3, 2, 2), np.float32)
    scores[0, [0, 1, 2, 2], [0, 0, 1, 1], [0, 1, 0, 1]] = 1
    response = await respond(image_call((2, 2)), scores, SIGNATURE)
    assert b'"lesion_fraction":0.75' in bytes(response.body)


async def test_a_classifier_answers_in_json_whatever_is_accepted() -> None:
    answers = [
        await respond(image_call(wants_png=wants_png), np.float32([[0.25, 0.75]]), SIGNATURE)
        for wants_png in (True, False)
    ]
    assert answers[0].body == answers[1].body
    assert b'"label":"polyp"' in bytes(answers[0].body)


async def test_masks_are_not_made_of_what_has_no_most_probable_class() -> None:
    with pytest.raises(ValueError, match="not finite"):
        await respond(image_call(), np.full((1, 2, 8, 6), np.nan, np.float32), SIGNATURE)
    with pytest.raises(Unsupported, match="tensors"):
        await respond(image_call(), np.ones((1, 300, 8, 6), np.float32), SIGNATURE)
