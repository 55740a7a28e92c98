"""The gateway's application: what leaves it has been sanitized, what it answers was answered to sanitized images.

One exception has to be switched on: `services.gateway.shadow` sends raw images too, whose answers stay here.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI

from services.gateway.administration import repository_api, usage_api
from services.gateway.config import GatewaySettings
from services.gateway.metadata import metadata_api
from services.gateway.page import page_api
from services.gateway.prediction import prediction_api
from services.gateway.repository import Repository, Version
from services.gateway.state import Gateway
from services.protocol.http import make_app


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
        ServiceError: a URL or the mapping is invalid, the device of the settings cannot be used, a mode could never
            answer anything, or the images for self-tests cannot be read.
    """
    gateway = Gateway(version, settings, repository=repository, transport=transport)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = make_app(
        "gateway",
        max_body_bytes=settings.max_body_bytes,
        docs=settings.docs,
        lifespan=lifespan,
        observe=gateway.metrics.request,
    )
    app.include_router(prediction_api(gateway))
    app.include_router(metadata_api(gateway))
    if settings.usage:
        app.include_router(usage_api(gateway))
    if settings.page:
        app.include_router(page_api(gateway))
    if settings.admin_token is not None:
        app.include_router(repository_api(gateway, settings.admin_token))
    return app


def load_gateway(settings: GatewaySettings) -> FastAPI:
    """The application around the version of the artifact that the settings name.

    Raises:
        ArtifactError: there is no artifact, or it cannot be loaded.
        ServiceError: as `make_gateway`.
    """
    repository = Repository(settings.artifact)
    return make_gateway(repository.load(settings.artifact_version), settings, repository=repository)
