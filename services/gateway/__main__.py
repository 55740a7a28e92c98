"""Serves the defended front door of a victim: python -m services.gateway --artifact DIR --victim-url URL.

    python -m services.gateway --artifact artifacts/defense --victim-url http://127.0.0.1:8000 --port 8080
    curl -F file=@scan.png http://127.0.0.1:8080/predict

Every flag has an environment variable: GATEWAY_ARTIFACT, GATEWAY_VICTIM_URL, ...
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the service until it is told to end."""
    # Here, so that something is said before PyTorch is imported, which takes seconds.
    from defense.errors import DefenseError
    from services.gateway.app import load_gateway
    from services.gateway.config import GatewaySettings
    from services.server import run_service

    return run_service(GatewaySettings, load_gateway, argv, prog=prog, errors=(DefenseError,))


if __name__ == "__main__":
    print("gateway: loading ...", file=sys.stderr, flush=True)
    sys.exit(main())
