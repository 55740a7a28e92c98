"""The gateway's application: it sends only sanitized images to the victim, and answers only from those.

Opt-in exceptions send raw images: shadow queries and self-tests, whose answers stay here, and the page's comparison.
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
    """The application around a sanitizer, `version`; without a repository, no other versions can be loaded.

    `transport` replaces the network to the victim in tests.

    Raises:
        ServiceError: the settings are invalid: URL, mapping, device, modes, or the self-test images.
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
    """The application around the artifact in the settings. Raises ArtifactError, and as `make_gateway`."""
    repository = Repository(settings.artifact)
    return make_gateway(repository.load(settings.artifact_version), settings, repository=repository)
