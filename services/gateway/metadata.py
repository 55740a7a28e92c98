"""Server, health and model metadata, by the Open Inference Protocol."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from services.gateway.requests import ModeSent, errors
from services.gateway.responses import OUTPUTS
from services.gateway.state import Gateway
from services.keys import KeySent
from services.protocol import oip

VERSION = "1"
"""Of the server's interface; versions of the model are the artifact's."""


def metadata_api(gateway: Gateway) -> APIRouter:
    """The paths below /v2 that predict nothing."""
    router = APIRouter(prefix="/v2")
    extensions = ["binary_tensor_data"] + (["model_repository"] if gateway.settings.admin_token else [])

    @router.get("")
    async def server() -> JSONResponse:
        """Who speaks."""
        return JSONResponse({"name": "zo-gateway", "version": VERSION, "extensions": extensions})

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"live": True})

    @router.get("/health/ready", responses=errors(503))
    async def ready() -> JSONResponse:
        """The sanitizer is loaded (it was before the first connection), and the victim is ready."""
        await gateway.check_ready()
        return JSONResponse({"ready": True})

    @router.get("/models/{name}", responses=errors(400, 401, 404, 429, 502, 503, 504))
    @router.get("/models/{name}/versions/{version}", responses=errors(400, 401, 404, 429, 502, 503, 504))
    async def model(key: KeySent, name: str, version: str | None = None, mode: ModeSent = None) -> JSONResponse:
        """What the model takes and answers, in the mode that is asked for or in the first one."""
        gateway.access.client(key)
        gateway.check_model(name, version)
        with gateway.current.in_use() as defense:
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

    @router.get("/models/{name}/ready", responses=errors(404, 503))
    @router.get("/models/{name}/versions/{version}/ready", responses=errors(404, 503))
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        """Whether the model is ready."""
        gateway.check_model(name, version)
        await gateway.check_ready()
        return JSONResponse({"name": name, "ready": True})

    return router
