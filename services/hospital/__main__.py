"""Serves a black box: python -m services.hospital --model artifacts/victim.

    python -m services.hospital --model artifacts/victim --port 8000
    curl -F file=@scan.png http://127.0.0.1:8000/predict

Every flag has an environment variable: HOSPITAL_MODEL, HOSPITAL_PORT, ...
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the service until it is told to end."""
    # Here, so that something is said before PyTorch is imported, which takes seconds.
    from services.hospital.app import make_hospital
    from services.hospital.config import HospitalSettings
    from services.hospital.model import load_victim
    from services.server import run_service

    return run_service(
        HospitalSettings, lambda settings: make_hospital(*load_victim(settings.model), settings), argv, prog=prog
    )


if __name__ == "__main__":
    print("hospital: loading ...", file=sys.stderr, flush=True)
    sys.exit(main())
