"""Administration by Triton's model repository extension: list, load, roll back.

The paths exist only with `--admin-token`, which requests to them, and to `GET /queries`, then carry as
`Authorization: Bearer TOKEN`.
"""

import hmac
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, params
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, SecretStr

from services.gateway.defense import Defense
from services.gateway.requests import errors
from services.gateway.state import Gateway
from services.protocol.errors import Unauthorized, Unsupported


class LoadParameters(BaseModel):
    """The `version` to load; None: the newest."""

    model_config = ConfigDict(extra="forbid")

    version: str | None = None


class LoadRequest(BaseModel):
    """The body of a request to load, in Triton's form."""

    model_config = ConfigDict(extra="forbid")

    parameters: LoadParameters = LoadParameters()


def operators_only(token: SecretStr) -> params.Depends:
    """A dependency that requires the admin token."""

    def authorized(authorization: Annotated[str | None, Header()] = None) -> None:
        expected = f"Bearer {token.get_secret_value()}"
        if not hmac.compare_digest((authorization or "").encode(), expected.encode()):
            raise Unauthorized("this path is the operator's: send 'Authorization: Bearer' and the admin token")

    dependency: params.Depends = Depends(authorized)
    return dependency


def usage_api(gateway: Gateway) -> APIRouter:
    """The path to every client's spending; it requires the admin token if there is one."""
    token = gateway.settings.admin_token
    router = APIRouter(dependencies=[operators_only(token)] if token else [])

    @router.get("/queries")
    async def queries() -> JSONResponse:
        """The victim queries of every key, by mode, and what the shadow saw; for the operator."""
        return JSONResponse(gateway.accounts.snapshot())

    return router


def repository_api(gateway: Gateway, token: SecretStr) -> APIRouter:
    """The paths below /v2/repository, which require the token."""
    router = APIRouter(prefix="/v2/repository", dependencies=[operators_only(token)])
    versions, model_name, check_model = gateway.versions, gateway.settings.model_name, gateway.check_model

    def told(number: str, state: str) -> dict[str, Any]:
        return {"name": model_name, "version": number, "state": state}

    async def changed(change: Awaitable[Defense]) -> JSONResponse:
        now = await change
        return JSONResponse({**told(now.number, "READY"), "artifact": now.manifest.id})

    @router.post("/index", responses=errors(401))
    async def index() -> JSONResponse:
        """All versions that there are, and which of them answers."""
        current = versions.current.number
        return JSONResponse(
            [
                told(one, "READY" if one == current else "UNAVAILABLE")
                for one in sorted({*versions.numbers(), current}, key=int)
            ]
        )

    @router.post("/models/{name}/load", responses=errors(400, 401, 404, 409, 502, 503, 504))
    async def load(name: str, asked: LoadRequest | None = None) -> JSONResponse:
        """Loads a version, by default the newest; it answers once it has passed its self-test."""
        check_model(name)
        return await changed(versions.load((asked or LoadRequest()).parameters.version))

    @router.post("/models/{name}/rollback", responses=errors(401, 404, 409))
    async def roll_back(name: str) -> JSONResponse:
        """Goes back to the version that answered before."""
        check_model(name)
        return await changed(versions.roll_back())

    @router.post("/models/{name}/unload", responses=errors(401, 404, 501))
    async def unload(name: str) -> JSONResponse:
        """Refused: a gateway without its sanitizer could only forward what it must not."""
        check_model(name)
        raise Unsupported("a gateway always serves a version; load another one, or stop the gateway")

    return router
