"""Hospital and gateway as a pair: of a patient's file, pixels alone go further than the gateway's reader."""

import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from dicom_files import SECRETS, dicom
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from service_fakes import assert_error, serving
from torch import nn

from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Version
from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig
from services.protocol import oip
from services.protocol.masks import decode_mask

pytestmark = pytest.mark.anyio

SCAN = np.zeros((50, 30), np.int16)
SCAN[:25] = 300  # bright above
SCAN[25:] = -700
WINDOW = {"RescaleSlope": 1, "RescaleIntercept": -100, "WindowCenter": -300.5, "WindowWidth": 2001}
DICOM_TYPE = {"Content-Type": "application/dicom"}


class BrightIsLesion(nn.Module):
    """A segmenter without weights: logits (0, l), l positive where the image is brighter than half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = 20 * (images - 0.5)
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


class Recorded(httpx.ASGITransport):
    """A victim in this process, and all that was ever sent to it."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.sent: list[bytes] = []
        self.images: list[np.ndarray] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        head = "\n".join([str(request.url), *(f"{name}: {value}" for name, value in request.headers.items())])
        self.sent.append(head.encode() + body)
        if oip.HEADER in request.headers:
            tensors = oip.decode_request(body, oip.header_length(request.headers[oip.HEADER]))
            self.images.extend(tensors.inputs[0].array)
        return await super().handle_async_request(request)


@asynccontextmanager
async def pair(labels: tuple[str, ...] = ("background", "lesion")) -> AsyncIterator[tuple[httpx.AsyncClient, Recorded]]:
    """A client of the gateway, and what stands behind it."""
    config = VictimConfig(labels=("background", "lesion"), channels=1, size=(32, 40))
    hospital = make_hospital(
        BrightIsLesion(), config, HospitalSettings(**{"model": "unused", "device": "cpu", "max_delay_ms": 0})
    )
    manifest = SimpleNamespace(
        id="sha256-abc",
        name="ours",
        sigma=0.0,
        queries_spent=0,
        labels=list(labels),
        input=SimpleNamespace(channels=1, height=32, width=40),
    )
    artifact: Any = SimpleNamespace(sanitizer=nn.Identity(), manifest=manifest)
    settings = GatewaySettings(
        **{"artifact": "unused", "victim_url": "http://victim", "device": "cpu", "max_delay_ms": 0, "docs": True}
    )
    victim = Recorded(hospital)
    async with (
        hospital.router.lifespan_context(hospital),
        serving(make_gateway(Version("1", artifact), settings, transport=victim)) as http,
    ):
        yield http, victim


@pytest.mark.parametrize("labels", [("background", "lesion"), ()])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
async def test_a_scan_is_answered_with_a_mask_of_its_rows_and_columns(syntax: Any, labels: tuple[str, ...]) -> None:
    data = dicom(SCAN, syntax, **WINDOW)
    async with pair(labels) as (http, victim):
        for question in (
            {"content": data, "headers": DICOM_TYPE},
            {"files": {"file": ("scan", data)}},
        ):
            response = await http.post("/predict", **question)
            assert response.status_code == 200, response.text
            told = response.json()
            classes = decode_mask(base64.b64decode(told["mask"]), 2, SCAN.shape)
            assert classes[:24].all()
            assert not classes[26:].any()
            assert told["lesion_fraction"] == pytest.approx(0.5, abs=0.03)
        expected = (np.array([300, -700]) - 100 + 301) / 2000 + 0.5
        assert victim.images[0][0, [0, -1], 0] == pytest.approx(expected, abs=1e-6)


async def test_a_frame_of_many_goes_through_the_gateway() -> None:
    frames = np.stack([SCAN, SCAN[::-1], SCAN])
    async with pair() as (http, _):
        data = dicom(frames, frames=True, **WINDOW)
        assert_error(await http.post("/predict", content=data, headers=DICOM_TYPE), 400, "3 frames", "`frame`")
        headers = {**DICOM_TYPE, "Accept": "image/png"}
        response = await http.post("/predict?frame=2", content=data, headers=headers)
        assert not decode_mask(response.content, 2, SCAN.shape)[:24].any()
        again = await http.post("/predict", files={"file": data}, data={"frame": "2"}, headers={"Accept": "image/png"})
        assert again.content == response.content
        assert_error(await http.post("/predict?frame=4", content=data, headers=DICOM_TYPE), 400, "from 1 to 3")


async def test_nothing_but_pixels_is_said_forwarded_or_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (None, "httpx", "httpcore"):  # `services.server` and `training.command.verb` quieten them
        caplog.set_level(logging.DEBUG, logger=name)
    whole = dicom(SCAN, **WINDOW)
    files = {
        200: [whole, dicom(SCAN, RLELossless)],
        400: [
            whole[:-100],
            whole[: whole.index(SECRETS[0].encode()) + 50],
            dicom(SCAN, WindowCenter="11111111", WindowWidth=1).replace(b"11111111", b"SENTINEL"),
        ],
        413: [
            whole.replace(b"US\x02\x00\x32\x00", b"US\x02\x00\xff\xff").replace(
                b"US\x02\x00\x1e\x00", b"US\x02\x00\xff\xff"
            )
        ],
        415: [
            whole.replace(b"MONOCHROME2 ", b"SENTINEL".ljust(12)),
            whole.replace(b"1.2.840.10008.1.2.1\0", b"SENTINEL".ljust(20, b"\0")),
        ],
    }
    heard = []
    for labels in (("background", "lesion"), ()):
        async with pair(labels) as (http, victim):
            for status, several in files.items():
                for data in several:
                    assert any(secret.encode() in data for secret in SECRETS)
                    for question in (
                        {"content": data, "headers": DICOM_TYPE},
                        {"files": {"file": (f"{SECRETS[0]}.dcm", data, "application/dicom")}},
                    ):
                        response = await http.post("/predict", **question)
                        assert response.status_code == status, response.text
                        heard.append(response.content + repr(response.headers).encode())
            assert victim.images
            heard += victim.sent
    out, err = capfd.readouterr()
    heard += [caplog.text.encode(), out.encode(), err.encode()]
    assert caplog.records  # it listens
    for one in heard:
        assert b"SENTINEL" not in one
        assert b"DICM" not in one
        for secret in SECRETS:
            assert secret.encode() not in one


async def test_the_gateways_openapi_document_tells_what_can_be_sent() -> None:
    async with pair() as (http, _):
        told = (await http.get("/openapi.json")).json()["paths"]["/predict"]["post"]
    assert "application/dicom" in told["requestBody"]["content"]
    assert "DICOM" in told["requestBody"]["description"]
