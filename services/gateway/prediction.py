"""Prediction requests, from headers to answer, and their paths."""

from dataclasses import replace

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response

from defense.smoothing import ABSTAIN
from services.admission import Admission
from services.gateway.defense import Defense
from services.gateway.modes import Plan
from services.gateway.requests import PREDICT_RESPONSES, Options, OptionsSent, require_room
from services.gateway.responses import OUTPUTS, Evidence, quote_response, verdict_response
from services.gateway.state import Gateway
from services.gateway.verdicts import Verdict, judge
from services.keys import Client
from services.protocol import deadlines
from services.protocol.requests import REQUEST, PredictRequest, read_request
from services.protocol.responses import respond


def prediction_api(gateway: Gateway) -> APIRouter:
    """The paths for predictions."""
    router = APIRouter()

    @router.post("/predict", responses=PREDICT_RESPONSES, openapi_extra=REQUEST)
    async def predict(request: Request, options: OptionsSent) -> Response:
        """Scores, or a mask, for an image (multipart field `file`, or its bytes); scores for OIP tensors."""
        return await defend(gateway, request, options)

    @router.post("/v2/models/{name}/infer", responses=PREDICT_RESPONSES)
    @router.post("/v2/models/{name}/versions/{version}/infer", responses=PREDICT_RESPONSES)
    async def infer(request: Request, options: OptionsSent, name: str, version: str | None = None) -> Response:
        """Scores for a batch as OIP tensors."""
        gateway.access.client(options.key)  # strangers are not told either which models there are
        gateway.check_model(name, version)
        return await defend(gateway, request, options, tensors_only=True)

    return router


async def defend(gateway: Gateway, request: Request, options: Options, *, tensors_only: bool = False) -> Response:
    """Reads a request and answers it while its client waits. Raises the ServiceError that says why it is refused."""
    client = gateway.access.client(options.key)
    deadlines.begin(request, gateway.settings.deadline_s)
    with gateway.current.in_use() as defense:
        plan = defense.modes.plan(options.mode, options.n)
        queue = gateway.copies if plan.copies else gateway.images
        if not options.dry_run:
            await require_room(request, queue, plan.queries(1))
        parsed = await read_request(
            request,
            defense.shape,
            gateway.decoders,
            max_body_bytes=gateway.settings.max_body_bytes,
            tensors_only=tensors_only,
            outputs=tuple(OUTPUTS[plan.mode]),
        )
        work = (
            _quote(gateway, client, defense, plan, parsed)
            if options.dry_run
            else _answer(gateway, client, defense, plan, queue, parsed)
        )
        return await deadlines.attended(request, work)


def _cost(gateway: Gateway, plan: Plan, images: int) -> int:
    return plan.queries(images) + (images if gateway.settings.shadow else 0)


async def _quote(gateway: Gateway, client: Client, defense: Defense, plan: Plan, parsed: PredictRequest) -> Response:
    evidence = Evidence(plan, _cost(gateway, plan, len(parsed.images)))
    return quote_response(parsed, evidence, gateway.accounts.quote(client.name), defense.signature)


async def _answer(
    gateway: Gateway, client: Client, defense: Defense, plan: Plan, queue: Admission, parsed: PredictRequest
) -> Response:
    """Admits the images, has them sanitized and answered or voted on, and responds with the evidence."""
    images = len(parsed.images)
    queue.check(plan.queries(images))  # before anything is looked at
    gateway.access.take(client, images)
    account = gateway.accounts.of(client.name)
    await gateway.detector.watch(client.name, account, parsed.images)
    with account.bill(plan.mode, _cost(gateway, plan, images)) as bill, queue.admit(plan.queries(images)):
        verdict: Verdict | None = None
        if plan.copies:
            votes = await defense.vote(parsed.images, plan, bill)
            verdict = await anyio.to_thread.run_sync(judge, plan, votes)
        scores = await defense.pipeline.ask(parsed.images, bill) if verdict is None else verdict.shares
        if gateway.settings.shadow:
            defense.shadow.watch(parsed.images, scores, bill)
        abstained = 0.0 if verdict is None else float((verdict.labels == ABSTAIN).mean()) * images
        gateway.metrics.answered(plan.mode, images, images * sum(plan.copies), abstained)
        evidence, signature = Evidence(plan, bill.spent), defense.signature
        if parsed.form == "image":
            signature = replace(signature, labels=await defense.pipeline.names(parsed.images, scores.shape[1]))
        if verdict is None:
            return await respond(parsed, scores, evidence.on(signature))
        return await verdict_response(parsed, verdict, evidence, signature)
