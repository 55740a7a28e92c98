"""The page at `/`, which shows people what the gateway does to an image and what it answers.

Three static files and a strict Content-Security-Policy. Answers come from `/predict`, with the client's key. Below
`/page` are the image before and after the sanitizer (no victim query), samples, the gateway's state and, if the
operator allows it, the bare model's answer, one query of the purpose "compare".
"""

import base64
import mimetypes
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from services.gateway.requests import errors, require_room
from services.gateway.state import Gateway
from services.keys import KeySent
from services.protocol import deadlines
from services.protocol.errors import InvalidInput, NotFound
from services.protocol.images import encode_png
from services.protocol.requests import REQUEST, PredictRequest, read_request
from services.protocol.responses import Signature, respond

COMPARE: Final = "compare"
"""What queries about raw images are for, on the client's account."""

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES: Final = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".dcm", ".tif", ".tiff")
_ATTACKED: Final = ".attacked"


def page_api(gateway: Gateway) -> APIRouter:
    """The page's paths. Raises InvalidInput if the folder of samples is not a folder."""
    settings, access, accounts = gateway.settings, gateway.access, gateway.accounts
    router = APIRouter(include_in_schema=False)
    samples = _samples(settings.page_samples)

    def static(name: str) -> Callable[[], Awaitable[Response]]:
        content = (files(__package__) / name).read_bytes()

        async def send() -> Response:
            return Response(content, media_type=_FILES[name], headers=_HEADERS)

        return send

    router.get("/")(static("index.html"))
    for name in ("page.css", "page.js"):
        router.get(f"/page/{name}")(static(name))

    @router.get("/page/samples")
    async def list_samples(key: KeySent) -> JSONResponse:
        """The samples, each with whether it was attacked."""
        access.client(key)
        return JSONResponse([{"name": name, "attacked": Path(name).stem.endswith(_ATTACKED)} for name in samples])

    @router.get("/page/samples/{name}", responses=errors(404))
    async def sample(name: str, key: KeySent) -> Response:
        """One of them, as a file."""
        access.client(key)
        if name not in samples:
            raise NotFound(f"no sample is called {name[:80]!r}")
        media = "application/dicom" if name.endswith(".dcm") else mimetypes.guess_type(name)[0]
        return FileResponse(samples[name], media_type=media, headers=_HEADERS)

    @router.get("/page/state")
    async def state(key: KeySent) -> JSONResponse:
        """How the gateway is, and what this client has spent."""
        client = access.client(key)
        with gateway.current.in_use() as defense:
            account = accounts.of(client.name)
            return JSONResponse(
                {
                    "ready": await defense.pipeline.ready(),
                    "model": settings.model_name,
                    "version": defense.number,
                    "artifact": defense.manifest.name,
                    "modes": list(defense.modes.allowed),
                    "compare": settings.page_compare,
                    "upstream_ms": gateway.metrics.mean_upstream_ms(),
                    "queries": sum(account.queries.values()),
                    "left": account.left,
                    "shadow": dict(account.shadow) if settings.shadow else None,
                },
                headers=_HEADERS,
            )

    async def uploaded(request: Request, key: str | None) -> tuple[PredictRequest, str]:
        """An image that a client of this name may have looked at."""
        client = access.client(key)
        deadlines.begin(request, settings.deadline_s)
        await require_room(request, gateway.images, 1)
        parsed = await read_request(
            request, gateway.current.shape, gateway.decoders, max_body_bytes=settings.max_body_bytes
        )
        if parsed.form != "image":
            raise InvalidInput("the page is about images; tensors are answered at /predict")
        access.take(client, 1)
        return parsed, client.name

    @router.post("/page/sanitized", openapi_extra=REQUEST)
    async def sanitized(request: Request, key: KeySent) -> JSONResponse:
        """The image as the sanitizer sees it, and what it makes of it: PNGs in base64. Costs no query."""
        parsed, _ = await uploaded(request, key)
        with gateway.current.in_use() as defense, gateway.images.admit(1):
            after = await deadlines.attended(request, defense.pipeline.sanitize(parsed.images))
        images = {"original": parsed.images[0].clip(0, 1), "sanitized": after[0]}
        told: dict[str, Any] = {name: base64.b64encode(encode_png(image)).decode() for name, image in images.items()}
        told["largest"] = float(abs(images["sanitized"] - images["original"]).max())
        return JSONResponse(told, headers=_HEADERS)

    if settings.page_compare:

        @router.post("/page/bare", openapi_extra=REQUEST)
        async def bare(request: Request, key: KeySent) -> Response:
            """What the bare model answers; never an answer to anybody's request at /predict."""
            parsed, name = await uploaded(request, key)
            with (
                gateway.current.in_use() as defense,
                accounts.of(name).bill(COMPARE, 1) as bill,
                gateway.images.admit(1),
            ):
                raw = parsed.images.clip(0, 1)
                scores = await deadlines.attended(request, defense.pipeline.forward(raw, bill))
                labels = await defense.pipeline.names(raw, scores.shape[1])
                return await respond(parsed, scores, Signature(settings.model_name, defense.number, labels))

    return router


def _samples(folder: Path | None) -> dict[str, Path]:
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InvalidInput(f"--page-samples {folder} is no folder")
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _IMAGES}
