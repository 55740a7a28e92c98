"""Serves the defended front door of a victim: python -m services.gateway --artifact DIR --victim-url URL.

    python -m services.gateway --artifact artifacts/defense --victim-url http://127.0.0.1:8000 --port 8080
    curl -F file=@scan.png http://127.0.0.1:8080/predict

Every flag has an environment variable: GATEWAY_ARTIFACT, GATEWAY_VICTIM_URL, ...
"""

import sys
from collections.abc import Sequence

from defense.artifact import load_artifact
from defense.errors import DefenseError
from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.protocol.errors import ServiceError
from services.runtime import prepare, read_settings, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service until it is told to end."""
    settings = read_settings(GatewaySettings, argv)
    prepare(settings)
    try:
        serve(make_gateway(load_artifact(settings.artifact), settings), "gateway", settings)
    except (DefenseError, ServiceError, OSError) as error:
        print(f"python -m services.gateway: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
