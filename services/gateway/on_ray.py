"""The gateway on Ray Serve, in as many replicas as the load needs, on one machine or many.

    python -m services.gateway.on_ray --artifact artifacts/phantom/zo-ds --victim-url http://localhost:8000

Needs `pip install 'zo-gateway[ray]'`. Joins the cluster that RAY_ADDRESS names, else starts one on this machine. Ray
scales by requests in flight; each replica makes its own batches.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Self

from fastapi import FastAPI
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from defense.errors import DefenseError
from services.gateway.app import load_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Repository
from services.protocol.errors import ServiceError
from services.server import access_of, prepare, read_settings

if TYPE_CHECKING:
    from ray.serve import Application

_OF_ONE_PROCESS = ("metrics_port", "admin_token", "tls_cert", "budget", "rate")


class RayGatewaySettings(GatewaySettings):
    """Serves a learned sanitizer in front of a victim, in replicas on Ray Serve.

    Flags may also be given as environment variables: GATEWAY_ARTIFACT, GATEWAY_PORT and so on.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", cli_prog_name="python -m services.gateway.on_ray")

    port: int = Field(8080, ge=1, le=65535, description="port to listen on")
    min_replicas: int = Field(1, ge=1, description="fewest replicas")
    max_replicas: int = Field(4, ge=1, description="most replicas")
    target_requests: float = Field(16.0, gt=0, description="requests in flight that a replica shall have")
    upscale_delay_s: float = Field(5.0, ge=0, description="seconds of more than that before replicas are added")
    downscale_delay_s: float = Field(60.0, ge=0, description="seconds of less than that before replicas are ended")
    cpus: float = Field(1.0, gt=0, description="CPUs that Ray sets aside for a replica")

    @model_validator(mode="after")
    def _refuse_what_one_process_keeps(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError("--min-replicas must not exceed --max-replicas")
        given = [name for name in _OF_ONE_PROCESS if getattr(self, name) is not None]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{flags}: a replica knows nothing of the others, so this would not hold; leave it out")
        return self


def application(settings: RayGatewaySettings) -> "Application":
    """The gateway as an application for `ray.serve.run`; paths in the settings have to be the same on every node."""
    from ray import serve

    def build() -> FastAPI:
        """Runs in each replica."""
        prepare(settings)
        return load_gateway(settings)

    deployment = serve.deployment(
        name="gateway",
        # What is beyond the gateway's own bound is refused by the gateway, not queued by Ray.
        max_ongoing_requests=settings.max_queue + 1,
        ray_actor_options={"num_cpus": settings.cpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
    )(serve.ingress(build)())
    made: Application = deployment.bind()
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until terminated. Returns the exit code: 0, or 2 after one line on stderr."""
    settings = read_settings(RayGatewaySettings, argv)
    settings = settings.model_copy(update={"artifact": settings.artifact.absolute()})
    program = RayGatewaySettings.model_config.get("cli_prog_name")
    if find_spec("ray") is None:
        print(f"{program}: error: Ray is not installed: pip install 'zo-gateway[ray]'", file=sys.stderr)
        return 2
    try:  # here, where it can be told, not in a replica that Ray starts again and again
        access_of(settings, str)
        Repository(settings.artifact).load(settings.artifact_version)
    except (ServiceError, DefenseError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    import ray
    from ray import serve

    ray.init(log_to_driver=settings.log_level == "debug", logging_level=logging.WARNING, ignore_reinit_error=True)
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(settings), name="gateway")
        print(f"gateway listening on http://{settings.host}:{settings.port}", flush=True)
        wait_to_be_ended()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    return 0


def wait_to_be_ended() -> None:
    """Returns at SIGTERM or SIGINT; Ray's own handler of SIGTERM, set when it starts, would end the process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
