"""Clients that we did not write speak to a gateway in front of a segmenter: tritonclient, and what curl would send."""

import asyncio
import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image, ImageDraw
from torch import nn

from services.hospital.model import VictimConfig

CONFIG = VictimConfig(labels=("background", "polyp"), channels=3, size=(32, 48))
IMAGES = np.random.default_rng(0).random((5, 3, 32, 48), dtype=np.float32)


class BrightIsPolyp(nn.Module):
    """A segmenter without weights: logits (0, l), l positive where the image is brighter than half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 20 * (images.mean(dim=1, keepdim=True) - 0.5)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


@pytest.fixture(scope="module")
def url(defend: Callable[..., str]) -> str:
    """Host and port of a gateway, which inverts, in front of the segmenter."""
    return defend(BrightIsPolyp(), CONFIG, modes="sanitize,smooth,certify", smooth_n=40, certify_n0=10, certify_n=80)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_receives_the_probabilities_of_every_pixel(url: str, binary: bool) -> None:
    expected = BrightIsPolyp()(1 - torch.from_numpy(IMAGES)).softmax(1).numpy()
    with triton.InferenceServerClient(url) as client:
        sent = triton.InferInput("images", list(IMAGES.shape), "FP32")
        sent.set_data_from_numpy(IMAGES, binary_data=binary)
        wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
        result = client.infer("defended", [sent], outputs=wanted)
        assert result.get_output("probabilities")["shape"] == [5, 2, 32, 48]
        scores = result.as_numpy("probabilities")
        assert client.get_model_metadata("defended")["outputs"] == [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2, 32, 48]}
        ]
    assert scores.shape == (5, 2, 32, 48)
    assert scores.dtype == np.float32
    assert scores == pytest.approx(expected, rel=1e-4)


@pytest.mark.anyio
@pytest.mark.parametrize("binary", [True, False])
async def test_the_asynchronous_client_receives_them_too(url: str, binary: bool) -> None:
    expected = BrightIsPolyp()(1 - torch.from_numpy(IMAGES)).softmax(1).numpy()
    async with triton_aio.InferenceServerClient(url) as client:
        sent = triton_aio.InferInput("images", list(IMAGES.shape), "FP32")
        sent.set_data_from_numpy(IMAGES, binary_data=binary)
        wanted = [triton_aio.InferRequestedOutput("probabilities", binary_data=binary)]
        answers = await asyncio.gather(*(client.infer("defended", [sent], outputs=wanted) for _ in range(3)))
    for answer in answers:
        assert answer.as_numpy("probabilities") == pytest.approx(expected, rel=1e-4)


LESION = (60, 40, 300, 160)
"""A dark box of 240 x 120 in the photograph's left half; the gateway inverts it, so it is bright for the victim."""


def photograph(orientation: int) -> bytes:
    """A JPEG of 600 x 400 as it is shown, 3:2; the pixels of orientation 6 lie on their side."""
    picture = Image.new("RGB", (600, 400), "white")
    ImageDraw.Draw(picture).rectangle((LESION[0], LESION[1], LESION[2] - 1, LESION[3] - 1), fill="black")
    if orientation == 6:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


def upload(url: str, orientation: int, query: str = "", **options: Any) -> httpx.Response:
    """curl -F file=@photograph.jpg http://url/predict."""
    files = {"file": ("photograph.jpg", photograph(orientation), "image/jpeg")}
    response = httpx.post(f"http://{url}/predict{query}", files=files, **options)
    assert response.status_code == 200, response.text
    assert response.headers["X-Artifact-Id"] == "sha256-abc"
    return response


def assert_mask(png: bytes) -> np.ndarray:
    """The PNG is black and white, as large as the photograph, and white on the lesion, up to a model's pixel."""
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (600, 400))
        mask = np.asarray(image)
    assert set(np.unique(mask)) == {0, 255}
    left, top, right, bottom = LESION
    edge = 13  # 600 / 48 and 400 / 32 are 12.5
    assert mask[top + edge : bottom - edge, left + edge : right - edge].min() == 255
    outside = np.ones(mask.shape, bool)
    outside[top - edge : bottom + edge, left - edge : right + edge] = False
    assert mask[outside].max() == 0
    return mask


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_uploaded_photograph_is_answered_with_a_mask_of_its_size(url: str, orientation: int) -> None:
    told = upload(url, orientation).json()
    assert set(told) == {"labels", "lesion_fraction", "mask", "evidence", "artifact"}
    assert told["labels"] == ["background", "polyp"]
    mask = assert_mask(base64.b64decode(told["mask"], validate=True))
    assert told["lesion_fraction"] == pytest.approx((mask == 255).mean(), abs=1e-12)
    assert told["lesion_fraction"] == pytest.approx(240 * 120 / (600 * 400), rel=0.1)
    assert told["artifact"]["id"] == "sha256-abc"


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_mask_itself_comes_to_those_who_accept_a_png(url: str, orientation: int) -> None:
    response = upload(url, orientation, headers={"Accept": "image/png"})
    assert response.headers["Content-Type"] == "image/png"
    assert_mask(response.content)
    assert response.content == base64.b64decode(upload(url, orientation).json()["mask"])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_certified_mask_has_the_photographs_size_and_says_where_it_abstains(url: str, orientation: int) -> None:
    """The lesion is far from undecided and its surroundings too; only in between it may abstain."""
    told = upload(url, orientation, "?mode=certify").json()
    planes = []
    for name in ("mask", "abstention"):
        with Image.open(io.BytesIO(base64.b64decode(told[name], validate=True))) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (600, 400))
            planes.append(np.asarray(image))
    mask, abstention = planes
    assert np.array_equal(mask == 128, abstention == 255)
    left, top, right, bottom = LESION
    edge = 26
    assert mask[top + edge : bottom - edge, left + edge : right - edge].min() == 255
    outside = np.ones(mask.shape, bool)
    outside[top - edge : bottom + edge, left - edge : right + edge] = False
    assert mask[outside].max() == 0
    assert told["evidence"]["queries"] == 90
    assert told["evidence"]["abstained_fraction"] == pytest.approx((mask == 128).mean())
    assert told["lesion_fraction"] == pytest.approx((mask == 255).mean())


def test_tritonclient_receives_every_pixels_certified_label(url: str) -> None:
    with triton.InferenceServerClient(url) as client:
        sent = triton.InferInput("images", list(IMAGES.shape), "FP32")
        sent.set_data_from_numpy(np.where(IMAGES > 0.5, np.float32(1), np.float32(0)))
        result = client.infer("defended", [sent], query_params={"mode": "certify"})
    labels = result.as_numpy("label")
    assert (labels.dtype, labels.shape) == (np.int64, (5, 32, 48))
    assert result.as_numpy("radius").shape == (5,)
    answered = labels != -1
    assert answered.any()
    shares = result.as_numpy("probabilities")
    assert np.array_equal(labels[answered], shares.argmax(1)[answered])
