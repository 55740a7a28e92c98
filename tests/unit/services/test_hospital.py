import asyncio
import base64
import gzip
import io
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from dicom_files import dicom
from PIL import Image
from service_fakes import assert_error, scores_of, serving, tensor_request
from torch import nn

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig, build_victim
from services.protocol import oip
from services.protocol.client import AsyncVictimClient, WireName
from services.protocol.images import decode_image, encode_png
from services.protocol.masks import class_map, decode_mask

pytestmark = pytest.mark.anyio

CONFIG = VictimConfig(labels=("a", "b", "c"), channels=1, size=(32, 32), width=0.125)
RNG = np.random.default_rng(0)


def model() -> nn.Module:
    torch.manual_seed(0)
    return build_victim(CONFIG).eval()


def settings(**changes: Any) -> HospitalSettings:
    return HospitalSettings(**{"model": "unused", "device": "cpu", "max_delay_ms": 0, **changes})


def expected(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(model()(torch.from_numpy(images)).softmax(dim=1))


def images(count: int) -> np.ndarray:
    return RNG.random((count, 1, 32, 32), dtype=np.float32)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(make_hospital(model(), CONFIG, settings(max_batch=16, max_body_mb=1))) as client:
        yield client


async def test_an_image_is_answered_with_label_labels_and_probabilities(http: httpx.AsyncClient) -> None:
    png = encode_png(images(1)[0])
    scores = expected(decode_image(png, channels=1, size=(32, 32))[None])[0]
    asked: list[dict[str, Any]] = [
        {"files": {"file": ("scan.png", png)}},
        {"content": png, "headers": {"Content-Type": "image/png"}},
        {"content": png, "headers": {"Content-Type": "Image/JPEG; q=1"}},
        {"content": gzip.compress(png), "headers": {"Content-Type": "image/png", "Content-Encoding": "gzip"}},
    ]
    for question in asked:
        response = await http.post("/predict", **question)
        assert response.status_code == 200, response.text
        told = response.json()
        assert set(told) == {"label", "labels", "probabilities"}
        assert told["labels"] == ["a", "b", "c"]
        assert told["label"] == told["labels"][int(np.argmax(scores))]
        assert told["probabilities"] == pytest.approx(scores.tolist(), rel=1e-5)


class BrightIsPolyp(nn.Module):
    """A segmenter without weights: logits (0, l), l positive where the image is brighter than half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 10 * (images.mean(dim=1, keepdim=True) - 0.5)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


SEGMENTER = VictimConfig(labels=("background", "polyp"), channels=1, size=(32, 40))


@pytest.fixture
async def segmenter() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(make_hospital(BrightIsPolyp(), SEGMENTER, settings(max_batch=16, docs=True))) as client:
        yield client


async def test_a_segmenter_answers_an_image_with_a_mask_of_the_images_size(segmenter: httpx.AsyncClient) -> None:
    png = encode_png(RNG.random((1, 9, 7)).repeat(8, axis=1).repeat(8, axis=2))  # 72 x 56, in coarse blocks
    seen = torch.from_numpy(decode_image(png, channels=1, size=(32, 40))[None])
    classes = class_map(BrightIsPolyp()(seen)[0].softmax(0).numpy(), (72, 56))
    for question in ({"files": {"file": png}}, {"content": png, "headers": {"Content-Type": "image/png"}}):
        response = await segmenter.post("/predict", **question)
        assert response.status_code == 200, response.text
        told = response.json()
        assert set(told) == {"labels", "lesion_fraction", "mask"}
        assert told["labels"] == ["background", "polyp"]
        assert told["lesion_fraction"] == pytest.approx(classes.mean())
        assert np.array_equal(decode_mask(base64.b64decode(told["mask"]), 2, (72, 56)), classes)
        question["headers"] = {**question.get("headers", {}), "Accept": "image/png"}
        response = await segmenter.post("/predict", **question)
        assert response.headers["Content-Type"] == "image/png"
        assert np.array_equal(decode_mask(response.content, 2, (72, 56)), classes)


async def test_a_segmenter_answers_tensors_with_probabilities_of_every_pixel(segmenter: httpx.AsyncClient) -> None:
    batch = RNG.random((20, 1, 32, 40), dtype=np.float32)
    question = tensor_request(batch)
    question["headers"]["Accept"] = "image/png"  # means nothing here
    scores = scores_of(await segmenter.post("/predict", **question))
    assert scores.shape == (20, 2, 32, 40)
    assert scores.dtype == np.float32
    assert scores == pytest.approx(BrightIsPolyp()(torch.from_numpy(batch)).softmax(1).numpy(), rel=1e-5)
    asked = {"inputs": [{"name": "x", "shape": [1, 1, 32, 40], "datatype": "FP32", "data": batch[:1].tolist()}]}
    assert np.array_equal(scores_of(await segmenter.post("/predict", json=asked)), scores[:1])


async def test_the_projects_client_reads_a_segmenter_over_both_wires() -> None:
    app = make_hospital(BrightIsPolyp(), SEGMENTER, settings())
    batch = (RNG.integers(0, 256, (3, 1, 32, 40)) / np.float32(255)).astype(np.float32)
    wires: tuple[WireName, ...] = ("tensor", "image")
    async with app.router.lifespan_context(app):
        for wire in wires:
            async with AsyncVictimClient(["http://test"], wire=wire, transport=httpx.ASGITransport(app)) as victim:
                scores = await victim.infer(batch)
                assert set(await victim.describe(batch[0])) == {"labels", "lesion_fraction", "mask"}
            assert scores.shape == (3, 2, 32, 40)
            assert np.array_equal(scores.argmax(1), batch[:, 0] > 0.5)
            assert (set(np.unique(scores)) == {0, 1}) is (wire == "image")


async def test_a_segmenter_that_answers_no_numbers_shows_no_empty_mask() -> None:
    class Sick(BrightIsPolyp):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) * torch.nan

    async with serving(make_hospital(Sick(), SEGMENTER, settings())) as http:
        for accept in ("image/png", "*/*"):
            png = {"files": {"file": encode_png(images(1)[0])}, "headers": {"Accept": accept}}
            assert_error(await http.post("/predict", **png), 500)


@pytest.mark.parametrize("size", [(72, 56), (5, 300)])
async def test_the_mask_of_a_dicom_or_tiff_has_its_rows_and_columns(
    segmenter: httpx.AsyncClient, size: tuple[int, int]
) -> None:
    halves = np.zeros(size, np.uint16)
    halves[: size[0] // 2] = 1000
    buffer = io.BytesIO()
    Image.fromarray(halves * 60).save(buffer, "TIFF")
    for data, media in ((dicom(halves), "application/dicom"), (buffer.getvalue(), "image/tiff")):
        headers = {"Accept": "image/png", "Content-Type": media}
        response = await segmenter.post("/predict", content=data, headers=headers)
        assert response.status_code == 200, response.text
        classes = decode_mask(response.content, 2, size)
        assert classes[: size[0] // 2 - 2].all()
        assert not classes[size[0] // 2 + 3 :].any()


async def test_the_openapi_document_tells_what_can_be_sent(segmenter: httpx.AsyncClient) -> None:
    told = (await segmenter.get("/openapi.json")).json()["paths"]["/predict"]["post"]
    content = told["requestBody"]["content"]
    assert {"multipart/form-data", "image/*", "application/dicom", "application/json"} <= set(content)
    assert set(content["multipart/form-data"]["schema"]["properties"]) == {"file", "frame"}
    assert [one["name"] for one in told["parameters"]] == ["frame"]
    for word in ("PNG", "JPEG", "TIFF", "DICOM"):
        assert word in told["requestBody"]["description"]


async def test_the_openapi_document_tells_of_both_answers(segmenter: httpx.AsyncClient) -> None:
    told = (await segmenter.get("/openapi.json")).json()["paths"]["/predict"]["post"]
    assert "mask" in told["description"]
    answers = told["responses"]["200"]
    assert {"application/json", "application/octet-stream", "image/png"} <= set(answers["content"])
    for word in ("label", "probabilities", "lesion_fraction", "mask", "Accept: image/png"):
        assert word in answers["description"]


@pytest.mark.parametrize("count", [1, 16, 100])
async def test_a_batch_of_any_size_is_answered_in_order(http: httpx.AsyncClient, count: int) -> None:
    batch = images(count)
    response = await http.post("/predict", **tensor_request(batch))
    assert scores_of(response) == pytest.approx(expected(batch), rel=1e-4)
    assert scores_of(response).dtype == np.float32


async def test_json_tensors_are_answered_in_json_unrounded(http: httpx.AsyncClient) -> None:
    batch = images(2)
    question = {
        "id": "42",
        "inputs": [{"name": "x", "shape": [2, 1, 32, 32], "datatype": "FP32", "data": batch.tolist()}],
    }
    response = await http.post("/predict", json=question)
    assert response.headers["Content-Type"] == "application/json"
    told = response.json()
    assert told["id"] == "42"
    assert told["outputs"][0]["datatype"] == "FP32"
    binary = await http.post("/predict", **tensor_request(batch))
    assert np.array_equal(scores_of(response), scores_of(binary))


async def test_raw_requests_are_one_image_answered_in_binary(http: httpx.AsyncClient) -> None:
    image = images(1)
    response = await http.post("/predict", content=image.tobytes(), headers={oip.HEADER: "0"})
    assert response.headers["Content-Type"] == "application/octet-stream"
    assert scores_of(response) == pytest.approx(expected(image), rel=1e-5)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_compressed_bodies_are_inflated_within_the_bound(http: httpx.AsyncClient, encoding: str) -> None:
    squeeze = gzip.compress if encoding == "gzip" else zlib.compress
    question = tensor_request(np.zeros((200, 1, 32, 32), np.float32))
    question["headers"]["Content-Encoding"] = encoding
    question["content"] = squeeze(question["content"])
    assert scores_of(await http.post("/predict", **question)).shape == (200, 3)
    question["content"] = squeeze(b"\0" * (2**20 + 1))
    assert_error(await http.post("/predict", **question), 413, "inflated")
    question["headers"]["Content-Encoding"] = "br"
    assert_error(await http.post("/predict", **question), 415, "'br'")


async def test_values_are_clamped_and_integers_are_levels(http: httpx.AsyncClient) -> None:
    wide = images(2) * 3 - 1
    answers = scores_of(await http.post("/predict", **tensor_request(wide)))
    assert answers == pytest.approx(expected(wide.clip(0, 1)), rel=1e-4)
    levels = RNG.integers(0, 256, (2, 1, 32, 32))
    for scale, dtype in ((1, np.uint8), (257, np.uint16)):
        answers = scores_of(await http.post("/predict", **tensor_request((levels * scale).astype(dtype))))
        assert answers == pytest.approx(expected(levels.astype(np.float32) / 255), rel=1e-4)
    for dtype in (np.float16, np.float64):
        answers = scores_of(await http.post("/predict", **tensor_request(images(1).astype(dtype))))
        assert answers.shape == (1, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_values_that_are_not_finite_are_refused(http: httpx.AsyncClient, value: float) -> None:
    batch = images(2)
    batch[1, 0, 3, 3] = value
    assert_error(await http.post("/predict", **tensor_request(batch)), 400, "not finite")


async def test_doubles_beyond_float32_are_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/predict", **tensor_request(np.full((1, 1, 32, 32), 1e300)))
    assert_error(response, 400, "not finite")


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 32, 31), (1, 32, 32), (32, 32), (0, 1, 32, 32)])
async def test_a_wrong_shape_is_answered_with_expected_and_got(http: httpx.AsyncClient, shape: tuple[int, ...]) -> None:
    response = await http.post("/predict", **tensor_request(np.zeros(shape, np.float32)))
    assert_error(response, 400, "[N, 1, 32, 32]", str(list(shape)))


async def test_what_is_no_image_tensor_is_refused(http: httpx.AsyncClient) -> None:
    assert_error(await http.post("/predict", **tensor_request(np.zeros((1, 1, 32, 32), np.int32))), 400, "INT32")
    two = oip.encode_request([oip.Tensor(name, images(1)) for name in "xy"])
    assert_error(await http.post("/predict", content=two[0], headers=two[1]), 400, "one input")
    question = {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
        "outputs": [{"name": "logits"}],
    }
    assert_error(await http.post("/predict", json=question), 400, "'probabilities'", "'logits'")


async def test_malformed_requests_are_answered_in_the_projects_form(http: httpx.AsyncClient) -> None:
    assert_error(await http.post("/predict"), 400, "JSON")
    assert_error(await http.post("/predict", content=b"{"), 400, "JSON")
    assert_error(await http.post("/predict", content=b"{}", headers={oip.HEADER: "many"}), 400, oip.HEADER)
    assert_error(await http.post("/predict", files={"scan": b"x"}), 400, "'file'")
    assert_error(await http.post("/predict", files={"file": (None, "text")}), 400, "'file'")
    assert_error(await http.post("/predict", files=[("file", b"x"), ("file", b"y")]), 400)
    assert_error(await http.post("/predict", files={"file": b"GIF89a"}), 415, "PNG")
    no_boundary = {"Content-Type": "multipart/form-data"}
    assert_error(await http.post("/predict", content=b"x", headers=no_boundary), 400)
    for media in ("application/pdf", "text/plain", "video/mp4"):
        response = await http.post("/predict", content=b"x", headers={"Content-Type": media})
        assert_error(response, 415, media)
    squeezed = {"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}
    assert_error(await http.post("/predict", content=b"x", headers=squeezed), 415, "multipart")
    for media in ("image/png", "application/json"):
        response = await http.post("/predict", content=b"x" * (2**20 + 1), headers={"Content-Type": media})
        assert_error(response, 413, "1048576")


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/redoc", "/openapi.json", "/predict/", "/v2", "/v2/models/hospital", "/weights"]
)
async def test_every_other_path_is_not_found(http: httpx.AsyncClient, path: str) -> None:
    assert_error(await http.get(path), 404)
    assert_error(await http.post(path), 404)


async def test_wrong_methods_are_answered_in_the_projects_form(http: httpx.AsyncClient) -> None:
    response = await http.get("/predict")
    assert_error(response, 405)
    assert response.headers["Allow"] == "POST"


async def test_health(http: httpx.AsyncClient) -> None:
    for what in ("live", "ready"):
        response = await http.get(f"/v2/health/{what}")
        assert response.status_code == 200
        assert response.json() == {what: True}


async def test_docs_can_be_switched_on() -> None:
    async with serving(make_hospital(model(), CONFIG, settings(docs=True))) as http:
        assert "/predict" in (await http.get("/openapi.json")).json()["paths"]
        assert (await http.get("/docs")).status_code == 200


async def test_a_failing_model_is_an_internal_error_that_tells_nothing() -> None:
    async with serving(make_hospital(nn.Linear(3, 3), CONFIG, settings())) as http:
        response = await http.post("/predict", **tensor_request(images(1)))
        assert_error(response, 500)
        assert response.json() == {"error": "internal error"}


async def test_concurrent_requests_are_merged_and_answered_apart() -> None:
    sizes: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, batch: torch.Tensor) -> Any:
            sizes.append(len(batch))
            return self.inner(batch)

    async with serving(make_hospital(Counting(), CONFIG, settings(max_batch=8, max_delay_ms=100))) as http:
        batches = [images(2) for _ in range(8)]
        answers = await asyncio.gather(*(http.post("/predict", **tensor_request(batch)) for batch in batches))
    for batch, response in zip(batches, answers, strict=True):
        assert scores_of(response) == pytest.approx(expected(batch), rel=1e-4)
    assert max(sizes) == 8
    assert sum(sizes) == 16


async def test_too_much_work_is_answered_429_with_retry_after() -> None:
    app = make_hospital(model(), CONFIG, settings(max_batch=4, max_queue=8))
    async with serving(app) as http:
        responses = await asyncio.gather(*(http.post("/predict", **tensor_request(images(6))) for _ in range(4)))
        refused = [response for response in responses if response.status_code != 200]
        assert refused
        assert len(refused) < 4
        for response in refused:
            assert_error(response, 429, "images")
            assert response.headers["Retry-After"] == "1"
        assert (await http.post("/predict", **tensor_request(images(100)))).status_code == 200


async def test_json_from_a_form_unaware_shell_is_read(http: httpx.AsyncClient) -> None:
    question = {"inputs": [{"name": "x", "shape": [1, 1, 32, 32], "datatype": "FP32", "data": [0.5] * 1024}]}
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await http.post("/predict", content=json.dumps(question), headers=headers)
    assert scores_of(response).shape == (1, 3)
