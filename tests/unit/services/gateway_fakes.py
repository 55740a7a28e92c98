"""What the gateway's tests share: a gateway with a sanitizer of one line, in front of a victim that remembers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from service_fakes import serving
from torch import Tensor, nn

from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Version
from services.protocol import oip
from services.protocol.images import decode_image, encode_png

MANIFEST = {"id": "sha256-abc", "name": "ours", "sigma": 0.25, "queries_spent": 1234}
SIGNATURE = {**MANIFEST, "version": "1"}
RNG = np.random.default_rng(0)
WHITE = encode_png(np.ones((1, 8, 6), np.float32))


class Inverts(nn.Module):
    """A sanitizer that leaves unmistakable traces: every value becomes 1 - value, clipped."""

    def forward(self, images: Tensor) -> Tensor:
        return (1 - images).clamp(0, 1)


class Answers(nn.Module):
    """A sanitizer that returns what `function` says."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class Upstream(httpx.AsyncBaseTransport):
    """A victim that records every image it receives, and answers their means."""

    def __init__(self, fails: Callable[[httpx.Request], httpx.Response] | None = None) -> None:
        self.fails = fails
        self.received: list[np.ndarray] = []
        self.requests = 0
        self.ready = 200
        self.describes: Callable[[], httpx.Response] = lambda: httpx.Response(415, json={"error": "tensors only"})
        self.described = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(self.ready)
        self.requests += 1
        body = await request.aread()
        if request.headers.get("Content-Type") == "image/png":
            self.received.extend(decode_image(body, channels=1, size=(8, 6))[None])
            self.described += 1
            return self.describes()
        images = oip.decode_request(body, oip.header_length(request.headers[oip.HEADER])).inputs[0].array
        self.received.extend(images)
        if self.fails is not None:
            return self.fails(request)
        return scored(victim(images))


def named(*labels: str) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, json={"label": "", "labels": labels, "probabilities": []})


def victim(images: np.ndarray) -> np.ndarray:
    mean = images.mean(axis=(1, 2, 3), dtype=np.float32)
    return np.stack([mean, 1 - mean], axis=1)


def scored(scores: np.ndarray) -> httpx.Response:
    outputs = [(oip.Tensor("probabilities", scores), True)]
    body, headers = oip.encode_response(outputs, model_name="v", model_version="1")
    return httpx.Response(200, content=body, headers=headers)


def pixels(images: np.ndarray) -> np.ndarray:
    """What `segmenting` answers: bright pixels are of class 1."""
    return np.concatenate([1 - images, images], axis=1).astype(np.float32)


def segmenting(request: httpx.Request) -> httpx.Response:
    images = oip.decode_request(request.content, oip.header_length(request.headers[oip.HEADER])).inputs[0].array
    return scored(pixels(images))


@asynccontextmanager
async def gateway(
    upstream: httpx.AsyncBaseTransport,
    sanitizer: nn.Module | None = None,
    *,
    labels: tuple[str, ...] = ("bright", "dark"),
    trained: float = 0.25,
    **changes: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    artifact: Any = SimpleNamespace(
        sanitizer=Inverts() if sanitizer is None else sanitizer,
        manifest=SimpleNamespace(
            **{**MANIFEST, "sigma": trained},
            labels=list(labels),
            input=SimpleNamespace(channels=1, height=8, width=6),
        ),
    )
    settings = GatewaySettings(
        **{"artifact": "unused", "victim_url": "http://victim", "device": "cpu", "max_delay_ms": 0, **changes}
    )
    async with serving(make_gateway(Version("1", artifact), settings, transport=upstream)) as http:
        yield http


def images(count: int) -> np.ndarray:
    return RNG.random((count, 1, 8, 6), dtype=np.float32)
