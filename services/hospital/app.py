"""The hospital's application: predictions and health, and 404 for the rest."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from torch import nn

from services.admission import Admission
from services.batching import Batcher
from services.device import resolve_device
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig
from services.keys import KeySent
from services.protocol import deadlines
from services.protocol.decoding.pool import DecodingPool, Limits
from services.protocol.http import make_app
from services.protocol.openapi import error_responses
from services.protocol.requests import REQUEST, PredictRequest, read_request
from services.protocol.responses import RESPONSES, Signature, respond
from services.server import access_of

_ERRORS: Final = {
    400: "what was sent is malformed, or does not fit the model",
    401: "the API key is missing, or another one",
    413: "the body, or the image in it, is too large",
    415: "a media type or content encoding that is not spoken here",
    429: "too much work is waiting, or the client sends faster than it may",
    500: "an error inside the service",
    501: "a part of the Open Inference Protocol that is not implemented",
    503: "the service is shutting down",
    504: "the time that the request has is over",
}


def make_hospital(model: nn.Module, config: VictimConfig, settings: HospitalSettings) -> FastAPI:
    """The application around a model in eval mode, which maps (N,C,H,W) in [0,1] to logits (N,K) or (N,K,H,W).

    Raises:
        ServiceError: the device or the file of keys in the settings cannot be used.
    """
    device = resolve_device(settings.device)
    model.to(device)
    shape = (config.channels, *config.size)
    signature = Signature(model_name="hospital", model_version="1", labels=config.labels)

    @torch.inference_mode()
    def run(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits: torch.Tensor = model(torch.from_numpy(images).to(device).clamp(0, 1))
        scores: npt.NDArray[np.float32] = logits.float().softmax(dim=1).cpu().numpy()
        return scores

    batcher = Batcher(run, max_batch=settings.max_batch, max_delay_s=settings.max_delay_ms / 1000)
    admission = Admission(settings.max_queue)
    decoders = DecodingPool(settings.decoders, limits=Limits.for_files(settings.max_body_bytes))
    access = access_of(settings, lambda _key: "anyone")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with batcher, decoders:
            yield

    app = make_app("hospital", max_body_bytes=settings.max_body_bytes, docs=settings.docs, lifespan=lifespan)

    @app.post("/predict", responses={**RESPONSES, **error_responses(_ERRORS)}, openapi_extra=REQUEST)
    async def predict(request: Request, key: KeySent) -> Response:
        """Scores, or a mask, for an image (multipart field `file`, or its bytes); scores for OIP tensors."""
        client = access.client(key)
        deadlines.begin(request, settings.deadline_s)
        parsed = await read_request(request, shape, decoders, max_body_bytes=settings.max_body_bytes)
        access.take(client, len(parsed.images))
        return await deadlines.attended(request, decide(parsed))

    async def decide(parsed: PredictRequest) -> Response:
        with admission.admit(len(parsed.images)):
            return await respond(parsed, await batcher(parsed.images), signature)

    @app.get("/v2/health/live")
    async def live() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        """The model is loaded: it was before the first connection."""
        return JSONResponse({"ready": True})

    return app
