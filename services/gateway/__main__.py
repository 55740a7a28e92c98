"""Serves the defended front door of a victim: python -m services.gateway --artifact DIR --victim-url URL.

    python -m services.gateway --artifact artifacts/defense --victim-url http://127.0.0.1:8000 --port 8080
    curl -F file=@scan.png http://127.0.0.1:8080/predict

Every flag has an environment variable: GATEWAY_ARTIFACT, GATEWAY_VICTIM_URL, ...
"""

import sys
from collections.abc import Sequence

from fastapi import FastAPI

from defense.errors import DefenseError
from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Repository
from services.server import run_service


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service until it is told to end."""
    return run_service(GatewaySettings, _build, argv, errors=(DefenseError,))


def _build(settings: GatewaySettings) -> FastAPI:
    repository = Repository(settings.artifact)
    return make_gateway(repository.load(settings.artifact_version), settings, repository=repository)


if __name__ == "__main__":
    sys.exit(main())
