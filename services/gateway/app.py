"""The gateway's application: what leaves it has been sanitized, what it answers was answered to sanitized images.

One exception has to be switched on: `services.gateway.shadow` sends raw images too, whose answers stay here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import anyio.to_thread
import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from defense.smoothing import ABSTAIN
from services.admission import Admission
from services.gateway.accounting import Accounts, Budget
from services.gateway.administration import operators_only, repository_api
from services.gateway.config import GatewaySettings
from services.gateway.defense import Defense
from services.gateway.detection import Detector
from services.gateway.metrics import Metrics
from services.gateway.modes import Plan
from services.gateway.page import page_api
from services.gateway.repository import Repository, Version
from services.gateway.requests import PREDICT_RESPONSES, ModeSent, Options, OptionsSent, errors, require_room
from services.gateway.responses import OUTPUTS, Evidence, quote_response, verdict_response
from services.gateway.verdicts import Verdict, judge
from services.gateway.versions import Versions, reloading_on_hangup
from services.keys import Client, KeySent
from services.protocol import deadlines, oip
from services.protocol.decoding.pool import DecodingPool, Limits
from services.protocol.errors import NotFound, Unavailable
from services.protocol.http import make_app
from services.protocol.requests import REQUEST, PredictRequest, read_request
from services.protocol.responses import respond
from services.server import access_of

VERSION = "1"
"""Of the server's interface; versions of the model are the artifact's."""


def make_gateway(
    version: Version,
    settings: GatewaySettings,
    *,
    repository: Repository | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """The application around a sanitizer.

    Args:
        version: the artifact to begin with.
        settings: the service's settings.
        repository: where other versions are loaded from; None: there are none.
        transport: in place of the network to the victim, for tests.

    Raises:
        ServiceError: a URL or the mapping is none, the device of the settings cannot be used, a mode could never
            answer anything, or the images for self-tests cannot be read.
    """
    accounts = Accounts(Budget(settings.budget, settings.budget_window_s))
    # Two queues: images as they come, and noisy copies. A request of a thousand copies is neither refused because of
    # ordinary traffic nor does it fill the queue of that: of copies, the voter has a few chunks only in work at once.
    admission = Admission(settings.max_queue)
    admission_of_copies = Admission(settings.max_copies)
    metrics = Metrics()
    build = partial(
        Defense, settings=settings, own=accounts.own, admission=admission, metrics=metrics, transport=transport
    )
    versions = Versions(version, build, repository, settings, accounts.own)
    queues = {"images": admission, "copies": admission_of_copies}
    metrics.watch(accounts, queues, lambda: (versions.current.number, versions.current.manifest.id))
    detector = Detector(settings)
    decoders = DecodingPool(settings.decoders, limits=Limits.for_files(settings.max_body_bytes))
    access = access_of(settings, accounts.name)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with metrics.serving(settings.host, settings.metrics_port):
            async with versions, decoders:
                with reloading_on_hangup(versions):
                    yield

    app = make_app(
        "gateway",
        max_body_bytes=settings.max_body_bytes,
        docs=settings.docs,
        lifespan=lifespan,
        observe=metrics.request,
    )

    async def defend(request: Request, options: Options, *, tensors_only: bool = False) -> Response:
        client = access.client(options.key)
        deadlines.begin(request, settings.deadline_s)
        with versions.current.in_use() as defense:
            plan = defense.modes.plan(options.mode, options.n)
            queue = admission_of_copies if plan.copies else admission
            if not options.dry_run:
                await require_room(request, queue, plan.queries(1))
            parsed = await read_request(
                request,
                defense.shape,
                decoders,
                max_body_bytes=settings.max_body_bytes,
                tensors_only=tensors_only,
                outputs=tuple(OUTPUTS[plan.mode]),
            )
            return await deadlines.attended(request, decide(options, client, defense, plan, queue, parsed))

    async def decide(
        options: Options, client: Client, defense: Defense, plan: Plan, queue: Admission, parsed: PredictRequest
    ) -> Response:
        pipeline = defense.pipeline
        queries = plan.queries(len(parsed.images))
        cost = queries + (len(parsed.images) if settings.shadow else 0)
        if options.dry_run:
            return quote_response(parsed, Evidence(plan, cost), accounts.quote(client.name), defense.signature)
        queue.check(queries)  # before anything is looked at
        access.take(client, len(parsed.images))
        account = accounts.of(client.name)
        await detector.watch(client.name, account, parsed.images)
        with account.bill(plan.mode, cost) as bill, queue.admit(queries):
            verdict: Verdict | None = None
            if plan.copies:
                votes = await defense.vote(parsed.images, plan, bill)
                verdict = await anyio.to_thread.run_sync(judge, plan, votes)
            scores = await pipeline.ask(parsed.images, bill) if verdict is None else verdict.shares
            if settings.shadow:
                defense.shadow.watch(parsed.images, scores, bill)
            abstained = 0.0 if verdict is None else float((verdict.labels == ABSTAIN).mean()) * len(parsed.images)
            metrics.answered(plan.mode, len(parsed.images), len(parsed.images) * sum(plan.copies), abstained)
            evidence, signed = Evidence(plan, bill.spent), defense.signature
            if parsed.form == "image":
                signed = replace(signed, labels=await pipeline.names(parsed.images, scores.shape[1]))
            if verdict is None:
                return await respond(parsed, scores, evidence.on(signed))
            return await verdict_response(parsed, verdict, evidence, signed)

    def check_model(name: str, number: str | None = None) -> None:
        if name != settings.model_name:
            raise NotFound(f"unknown model {name[:80]!r}; the model here is {settings.model_name!r}")
        current = versions.current.number
        if number not in (None, current):
            raise NotFound(f"version {number[:80]!r} of {name!r} is not served; the version here is {current!r}")

    async def check_ready() -> None:
        if not await versions.current.pipeline.ready():
            raise Unavailable("the model behind the gateway is not ready")

    @app.post("/predict", responses=PREDICT_RESPONSES, openapi_extra=REQUEST)
    async def predict(request: Request, options: OptionsSent) -> Response:
        """Scores, or a mask, for an image (multipart field `file`, or its bytes); scores for OIP tensors."""
        return await defend(request, options)

    @app.post("/v2/models/{name}/infer", responses=PREDICT_RESPONSES)
    @app.post("/v2/models/{name}/versions/{version}/infer", responses=PREDICT_RESPONSES)
    async def infer(request: Request, options: OptionsSent, name: str, version: str | None = None) -> Response:
        """Scores for a batch as OIP tensors."""
        access.client(options.key)  # strangers are not told either which models there are
        check_model(name, version)
        return await defend(request, options, tensors_only=True)

    extensions = ["binary_tensor_data"] + (["model_repository"] if settings.admin_token else [])

    @app.get("/v2")
    async def server() -> JSONResponse:
        """Who speaks."""
        return JSONResponse({"name": "zo-gateway", "version": VERSION, "extensions": extensions})

    @app.get("/v2/health/live")
    async def live() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready", responses=errors(503))
    async def ready() -> JSONResponse:
        """The sanitizer is loaded (it was before the first connection), and the victim is ready."""
        await check_ready()
        return JSONResponse({"ready": True})

    @app.get("/v2/models/{name}", responses=errors(400, 401, 404, 429, 502, 503, 504))
    @app.get("/v2/models/{name}/versions/{version}", responses=errors(400, 401, 404, 429, 502, 503, 504))
    async def model(key: KeySent, name: str, version: str | None = None, mode: ModeSent = None) -> JSONResponse:
        """What the model takes and answers, in the mode that is asked for or in the first one."""
        access.client(key)
        check_model(name, version)
        with versions.current.in_use() as defense:
            plan = defense.modes.plan(mode, None)
            scores = await defense.pipeline.scores_shape()
            return JSONResponse(
                {
                    "name": name,
                    "versions": [defense.number],
                    "platform": "zo-gateway",
                    "inputs": [{"name": oip.INPUT, "datatype": "FP32", "shape": [-1, *defense.shape]}],
                    "outputs": [
                        {"name": output, "datatype": datatype, "shape": [-1, *of_one(scores)]}
                        for output, (datatype, of_one) in OUTPUTS[plan.mode].items()
                    ],
                    "parameters": {
                        **defense.signature.parameters,
                        "modes": ",".join(defense.modes.allowed),
                        "runtime": defense.pipeline.runtime,
                    },
                }
            )

    @app.get("/v2/models/{name}/ready", responses=errors(404, 503))
    @app.get("/v2/models/{name}/versions/{version}/ready", responses=errors(404, 503))
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        """Whether the model is ready."""
        check_model(name, version)
        await check_ready()
        return JSONResponse({"name": name, "ready": True})

    if settings.usage:

        @app.get("/queries", dependencies=[operators_only(settings.admin_token)] if settings.admin_token else [])
        async def queries() -> JSONResponse:
            """The victim queries of every key, by mode, and what the shadow saw; for the operator."""
            return JSONResponse(accounts.snapshot())

    if settings.page:
        app.include_router(
            page_api(
                versions,
                settings,
                access=access,
                accounts=accounts,
                admission=admission,
                metrics=metrics,
                decoders=decoders,
            )
        )

    if settings.admin_token is not None:
        app.include_router(repository_api(versions, settings.model_name, settings.admin_token, check_model))

    return app
