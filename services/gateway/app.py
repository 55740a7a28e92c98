"""The gateway's application: what leaves it has been sanitized, what it answers was answered to sanitized images."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import httpx
import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import nn

from defense.artifact import Artifact
from services.batching import Admission, Array, Batcher
from services.device import resolve_device
from services.gateway.config import GatewaySettings
from services.protocol import oip
from services.protocol.calls import REQUEST, RESPONSES, Call, Signature, answer, read_call
from services.protocol.client import AsyncVictimClient
from services.protocol.errors import (
    TRANSIENT,
    NotFound,
    Overloaded,
    ServiceError,
    Unavailable,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from services.protocol.http import make_app
from services.protocol.mapping import load_mapping

VERSION = "1"

# What clients are told of the victim's failures: the meaning, not the inside (addresses, the victim's own words).
_TOLD: dict[type[ServiceError], str] = {
    Overloaded: "the model behind the gateway is overloaded; come back later",
    Unavailable: "the model behind the gateway is not available; come back later",
    UpstreamUnreachable: "the model behind the gateway cannot be reached",
    UpstreamTimeout: "the model behind the gateway did not answer in time",
    UpstreamInvalid: "the model behind the gateway gave no valid answer",
}


@contextmanager
def _retold() -> Iterator[None]:
    """Turns the victim's failures into what clients are told of them."""
    try:
        yield
    except ServiceError as error:
        # What else the victim objects to (400, 413, ...) was said of the gateway's request, not the client's.
        kind = type(error) if type(error) in _TOLD else UpstreamInvalid
        raise kind(_TOLD[kind], retry_after=error.retry_after) from error


def _sanitizing(sanitizer: nn.Module, device: torch.device) -> Callable[[Array], Array]:
    """The function (n,C,H,W) -> (n,C,H,W) that the batcher runs; refuses to return anything that is no image."""
    sanitizer.to(device).eval()

    @torch.inference_mode()
    def run(images: Array) -> Array:
        sanitized = sanitizer(torch.from_numpy(images).to(device))
        if sanitized.shape != images.shape or not bool(((sanitized >= 0) & (sanitized <= 1)).all()):
            raise RuntimeError("the sanitizer returned something that is no image in [0,1]")
        array: Array = sanitized.float().cpu().numpy()
        return array

    return run


def make_gateway(
    artifact: Artifact, settings: GatewaySettings, *, transport: httpx.AsyncBaseTransport | None = None
) -> FastAPI:
    """The application around a sanitizer.

    Args:
        artifact: the sanitizer and its manifest.
        settings: the service's settings.
        transport: in place of the network to the victim, for tests.

    Raises:
        ServiceError: a URL or the mapping is none, or the device of the settings cannot be used.
    """
    manifest = artifact.manifest
    labels = manifest.labels
    shape = (manifest.input.channels, manifest.input.height, manifest.input.width)
    identity = {"name": manifest.name, "sigma": manifest.sigma, "queries_spent": manifest.queries_spent}
    signature = Signature(
        model_name=settings.model_name,
        model_version=VERSION,
        labels=labels,
        extra={"artifact": {"id": manifest.id, **identity}},
        parameters={
            "artifact_id": manifest.id,
            "artifact_name": manifest.name,
            "sigma": manifest.sigma,
            "queries_spent": manifest.queries_spent,
        },
        headers={"X-Artifact-Id": manifest.id},
    )
    victim = AsyncVictimClient(
        settings.victim_url,
        batch=settings.forward_batch,
        in_flight=settings.in_flight,
        timeout_s=settings.timeout_s,
        wire=settings.wire,
        mapping=load_mapping(settings.victim_mapping),
        transport=transport,
    )
    batcher = Batcher(
        _sanitizing(artifact.sanitizer, resolve_device(settings.device)),
        max_batch=settings.max_batch,
        max_delay_s=settings.max_delay_ms / 1000,
    )
    admission = Admission(settings.max_queue)
    learned_labels: dict[int, Sequence[str]] = {}  # by number of classes
    learned_shape: tuple[int, ...] = ()  # of the scores for one image: (K), or (K,H,W)
    learning = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with victim, batcher:
            yield

    app = make_app("gateway", max_body_bytes=settings.max_body_bytes, docs=settings.docs, lifespan=lifespan)

    async def victims_labels(sanitized: Array, classes: int) -> Sequence[str]:
        """The victim's own names, asked for once; numbers where it gives none.

        A sanitizer that was trained without any query does not know them.
        """
        async with learning:
            if classes not in learned_labels:
                try:
                    told = (await victim.describe(sanitized))["labels"]
                except TRANSIENT:
                    raise
                except ServiceError:  # it takes no images, or has no names; asking again would cost a query each time
                    told = None
                names = told if isinstance(told, list) and len(told) == classes else range(classes)
                learned_labels[classes] = [str(name) for name in names]
            return learned_labels[classes]

    async def ask(images: Array) -> tuple[Array, Array]:
        """The sanitized images, and the victim's scores for them."""
        nonlocal learned_shape
        sanitized = await batcher(images)
        with _retold():
            scores = await victim.infer(sanitized)
        if labels and scores.shape[1] != len(labels):
            raise UpstreamInvalid(f"the model answers {scores.shape[1]} scores; the artifact has {len(labels)} labels")
        learned_shape = scores.shape[1:]
        return sanitized, scores

    async def scores_shape() -> tuple[int, ...]:
        """What the victim answers to one image; if none was sent so far, it is asked about a grey one, once.

        Neither the artifact nor a victim's URL says whether the victim scores images or pixels, and the protocol knows
        no shape that leaves the number of axes open.
        """
        async with learning:
            if not learned_shape:
                with admission.admit(1):
                    await ask(np.full((1, *shape), 0.5, np.float32))
            return learned_shape

    async def defend(call: Call) -> Response:
        with admission.admit(len(call.images)):
            sanitized, scores = await ask(call.images)
            if labels or call.form != "image":
                return await answer(call, scores, signature)
            with _retold():
                names = await victims_labels(sanitized[0], scores.shape[1])
            return await answer(call, scores, replace(signature, labels=names))

    def check_model(name: str, version: str) -> None:
        if name != settings.model_name:
            raise NotFound(f"unknown model {name[:80]!r}; the model here is {settings.model_name!r}")
        if version != VERSION:
            raise NotFound(f"unknown version {version[:80]!r} of {name!r}; the version here is {VERSION!r}")

    async def check_ready() -> None:
        if not await victim.ready():
            raise Unavailable("the model behind the gateway is not ready")

    @app.post("/predict", responses=RESPONSES, openapi_extra=REQUEST)
    async def predict(request: Request) -> Response:
        """Scores, or a mask, for an image (multipart field `file`, or its bytes); scores for OIP tensors."""
        return await defend(await read_call(request, shape, max_body_bytes=settings.max_body_bytes))

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        """Scores for a batch as OIP tensors."""
        check_model(name, version)
        return await defend(await read_call(request, shape, max_body_bytes=settings.max_body_bytes, tensors_only=True))

    @app.get("/v2")
    async def server() -> JSONResponse:
        """Who speaks."""
        return JSONResponse({"name": "zo-gateway", "version": VERSION, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live")
    async def live() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """The sanitizer is loaded (it was before the first connection), and the victim is ready."""
        await check_ready()
        return JSONResponse({"ready": True})

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model(name: str, version: str = VERSION) -> JSONResponse:
        """What the model takes and answers."""
        check_model(name, version)
        return JSONResponse(
            {
                "name": name,
                "versions": [VERSION],
                "platform": "zo-gateway",
                "inputs": [{"name": oip.INPUT, "datatype": "FP32", "shape": [-1, *shape]}],
                "outputs": [{"name": oip.OUTPUT, "datatype": "FP32", "shape": [-1, *await scores_shape()]}],
                "parameters": dict(signature.parameters),
            }
        )

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> JSONResponse:
        """Whether the model is ready."""
        check_model(name, version)
        await check_ready()
        return JSONResponse({"name": name, "ready": True})

    return app
