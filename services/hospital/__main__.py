"""Serves a black box: python -m services.hospital --model artifacts/victim.

    python -m services.hospital --model artifacts/victim --port 8000
    curl -F file=@scan.png http://127.0.0.1:8000/predict

Every flag has an environment variable: HOSPITAL_MODEL, HOSPITAL_PORT, ...
"""

import sys
from collections.abc import Sequence

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import load_victim
from services.protocol.errors import ServiceError
from services.runtime import prepare, read_settings, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service until it is told to end."""
    settings = read_settings(HospitalSettings, argv)
    prepare(settings)
    try:
        model, config = load_victim(settings.model)
        serve(make_hospital(model, config, settings), "hospital", settings)
    except (ServiceError, OSError) as error:
        print(f"python -m services.hospital: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
