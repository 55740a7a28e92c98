"""The gateway's application: what leaves it has been sanitized, what it answers was answered to sanitized images.

One exception has to be switched on: `services.gateway.shadow` sends raw images too, whose answers stay here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio.to_thread
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from defense.artifact import Artifact, Manifest
from services.batching import Admission
from services.gateway.accounting import Accounts, Budget
from services.gateway.answers import OUTPUTS, Evidence, answer_quote, answer_verdict
from services.gateway.asking import ANSWERS, Asked, Asking, ModeAsked, errors
from services.gateway.config import GatewaySettings
from services.gateway.detection import Detector
from services.gateway.modes import Modes
from services.gateway.pipeline import Pipeline
from services.gateway.shadow import Shadow
from services.gateway.verdicts import Verdict, judge
from services.gateway.voting import Voter
from services.protocol import oip
from services.protocol.calls import REQUEST, Signature, answer, read_call
from services.protocol.errors import NotFound, Unavailable
from services.protocol.http import make_app

VERSION = "1"


def make_gateway(
    artifact: Artifact, settings: GatewaySettings, *, transport: httpx.AsyncBaseTransport | None = None
) -> FastAPI:
    """The application around a sanitizer.

    Args:
        artifact: the sanitizer and its manifest.
        settings: the service's settings.
        transport: in place of the network to the victim, for tests.

    Raises:
        ServiceError: a URL or the mapping is none, the device of the settings cannot be used, or a mode could never
            answer anything.
    """
    manifest = artifact.manifest
    shape = (manifest.input.channels, manifest.input.height, manifest.input.width)
    signature = _signature(manifest, settings.model_name)
    modes = Modes(settings, manifest.sigma)
    accounts = Accounts(Budget(settings.budget, settings.budget_window_s))
    # Two queues: images as they come, and noisy copies. A request of a thousand copies is neither refused because of
    # ordinary traffic nor does it fill the queue of that: of copies, the voter has a few chunks only in work at once.
    admission = Admission(settings.max_queue)
    admission_of_copies = Admission(settings.max_copies)
    pipeline = Pipeline(
        artifact.sanitizer,
        shape,
        manifest.labels,
        settings,
        own=accounts.own,
        admission=admission,
        transport=transport,
    )
    vote = Voter(pipeline.ask, chunk=settings.chunk)
    detector = Detector(settings)
    shadow = Shadow(pipeline.forward, max_images=settings.max_queue, least_dice=settings.shadow_dice)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with pipeline, shadow:
            yield

    app = make_app("gateway", max_body_bytes=settings.max_body_bytes, docs=settings.docs, lifespan=lifespan)

    async def defend(request: Request, asked: Asked, *, tensors_only: bool = False) -> Response:
        plan = modes.plan(asked.mode, asked.n)
        call = await read_call(
            request,
            shape,
            max_body_bytes=settings.max_body_bytes,
            tensors_only=tensors_only,
            outputs=tuple(OUTPUTS[plan.mode]),
        )
        queries = plan.queries(len(call.images))
        cost = queries + (len(call.images) if settings.shadow else 0)
        if asked.dry_run:
            return answer_quote(call, Evidence(plan, cost), accounts.quote(asked.key), signature)
        account = accounts.of(asked.key)
        await detector.watch(accounts.name(asked.key), account, call.images)
        queue = admission_of_copies if plan.copies else admission
        with account.bill(plan.mode, cost) as bill, queue.admit(queries):
            verdict: Verdict | None = None
            if plan.copies:
                votes = await vote(call.images, plan, bill, request.is_disconnected)
                verdict = await anyio.to_thread.run_sync(judge, plan, votes)
            scores = await pipeline.ask(call.images, bill) if verdict is None else verdict.shares
            if settings.shadow:
                shadow.watch(call.images, scores, bill)
            evidence, signed = Evidence(plan, bill.spent), signature
            if call.form == "image":
                signed = replace(signature, labels=await pipeline.names(call.images, scores.shape[1]))
            if verdict is None:
                return await answer(call, scores, evidence.on(signed))
            return await answer_verdict(call, verdict, evidence, signed)

    def check_model(name: str, version: str) -> None:
        if name != settings.model_name:
            raise NotFound(f"unknown model {name[:80]!r}; the model here is {settings.model_name!r}")
        if version != VERSION:
            raise NotFound(f"unknown version {version[:80]!r} of {name!r}; the version here is {VERSION!r}")

    async def check_ready() -> None:
        if not await pipeline.ready():
            raise Unavailable("the model behind the gateway is not ready")

    @app.post("/predict", responses=ANSWERS, openapi_extra=REQUEST)
    async def predict(request: Request, asked: Asking) -> Response:
        """Scores, or a mask, for an image (multipart field `file`, or its bytes); scores for OIP tensors."""
        return await defend(request, asked)

    @app.post("/v2/models/{name}/infer", responses=ANSWERS)
    @app.post("/v2/models/{name}/versions/{version}/infer", responses=ANSWERS)
    async def infer(request: Request, asked: Asking, name: str, version: str = VERSION) -> Response:
        """Scores for a batch as OIP tensors."""
        check_model(name, version)
        return await defend(request, asked, tensors_only=True)

    @app.get("/v2")
    async def server() -> JSONResponse:
        """Who speaks."""
        return JSONResponse({"name": "zo-gateway", "version": VERSION, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live")
    async def live() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready", responses=errors(503))
    async def ready() -> JSONResponse:
        """The sanitizer is loaded (it was before the first connection), and the victim is ready."""
        await check_ready()
        return JSONResponse({"ready": True})

    @app.get("/v2/models/{name}", responses=errors(400, 404, 429, 502, 503, 504))
    @app.get("/v2/models/{name}/versions/{version}", responses=errors(400, 404, 429, 502, 503, 504))
    async def model(name: str, version: str = VERSION, mode: ModeAsked = None) -> JSONResponse:
        """What the model takes and answers, in the mode that is asked for or in the first one."""
        check_model(name, version)
        plan = modes.plan(mode, None)
        scores = await pipeline.scores_shape()
        return JSONResponse(
            {
                "name": name,
                "versions": [VERSION],
                "platform": "zo-gateway",
                "inputs": [{"name": oip.INPUT, "datatype": "FP32", "shape": [-1, *shape]}],
                "outputs": [
                    {"name": output, "datatype": datatype, "shape": [-1, *of_one(scores)]}
                    for output, (datatype, of_one) in OUTPUTS[plan.mode].items()
                ],
                "parameters": {**signature.parameters, "modes": ",".join(modes.allowed)},
            }
        )

    @app.get("/v2/models/{name}/ready", responses=errors(404, 503))
    @app.get("/v2/models/{name}/versions/{version}/ready", responses=errors(404, 503))
    async def model_ready(name: str, version: str = VERSION) -> JSONResponse:
        """Whether the model is ready."""
        check_model(name, version)
        await check_ready()
        return JSONResponse({"name": name, "ready": True})

    if settings.usage:

        @app.get("/queries")
        async def queries() -> JSONResponse:
            """The victim queries of every key, by mode, and what the shadow saw; for the operator."""
            return JSONResponse(accounts.snapshot())

    return app


def _signature(manifest: Manifest, model_name: str) -> Signature:
    """Who answers, but for the classes' names."""
    identity = {"id": manifest.id, "name": manifest.name, "version": VERSION}
    origin = {"sigma": manifest.sigma, "queries_spent": manifest.queries_spent}
    return Signature(
        model_name=model_name,
        model_version=VERSION,
        labels=(),
        extra={"artifact": {**identity, **origin}},
        parameters={**{f"artifact_{name}": value for name, value in identity.items()}, **origin},
        headers={"X-Artifact-Id": manifest.id},
    )
