"""What both services do around their applications: settings from flags and environment, and serving."""

import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, TypeVar

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from services.protocol.errors import ServiceError

_GRACE_S = 30
_Settings = TypeVar("_Settings", bound="ServiceSettings")


class ServiceSettings(BaseSettings):
    """Settings that both services have; each is a flag, and an environment variable with the service's prefix."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens the service to the network")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="CPU threads of the device's work; 0 leaves the choice to PyTorch")
    max_batch: int = Field(256, ge=1, description="most images in one batch for the device")
    max_delay_ms: float = Field(
        2.0, ge=0, le=1000, description="how long a batch waits for more images, in milliseconds"
    )
    max_queue: int = Field(16384, ge=1, description="images waiting or in work beyond which requests are answered 429")
    deadline_s: float = Field(
        300.0, gt=0, description="most seconds for a request, from its headers to its answer, before it is answered 504"
    )
    max_body_mb: int = Field(256, ge=1, description="largest request body in MiB, also when inflated")
    docs: bool = Field(False, description="serve the OpenAPI document at /openapi.json and its page at /docs")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what to log to stderr")

    @property
    def max_body_bytes(self) -> int:
        """The bound on the request body in bytes."""
        return self.max_body_mb * 2**20


def read_settings(kind: type[_Settings], argv: Sequence[str] | None) -> _Settings:
    """Reads settings from flags, then the environment, then defaults.

    Args:
        kind: the settings class; its `cli_prog_name` names the program.
        argv: the arguments without the program's name; `sys.argv[1:]` when None.

    Raises:
        SystemExit: a flag or variable is missing or wrong (code 2, one line each on stderr), or --help was asked for.
    """
    try:
        return CliApp.run(kind, cli_args=list(sys.argv[1:] if argv is None else argv))
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        for one in error.errors():
            name = str(one["loc"][0])
            flag = f"--{name.replace('_', '-')} (or {prefix}{name.upper()})"
            print(f"{kind.model_config.get('cli_prog_name')}: error: {flag}: {one['msg']}", file=sys.stderr)
        raise SystemExit(2) from None


def prepare(settings: ServiceSettings) -> None:
    """Sets up what is global to the process: logging and threads."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if settings.threads:
        torch.set_num_threads(settings.threads)


def serve(app: FastAPI, name: str, settings: ServiceSettings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests end.

    Prints one line with the URL to stdout once the socket accepts connections.

    Raises:
        OSError: the address cannot be listened on.
    """
    is_v6 = ":" in settings.host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family, backlog=1024) as listener:
        host = f"[{settings.host}]" if is_v6 else settings.host
        print(f"{name} listening on http://{host}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE_S
        )
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def run_service(
    kind: type[_Settings],
    build: Callable[[_Settings], FastAPI],
    argv: Sequence[str] | None,
    *,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a service until it is told to end.

    Args:
        kind: the settings class.
        build: makes the application; its title names the service.
        argv: the arguments without the program's name; `sys.argv[1:]` when None.
        errors: what `build` raises besides `ServiceError` and `OSError` when something is wrong outside the program.

    Returns:
        the exit code: 0, or 2 after one line on stderr.

    Raises:
        SystemExit: as `read_settings`.
    """
    known: tuple[type[Exception], ...] = (ServiceError, OSError, *errors)
    settings = read_settings(kind, argv)
    prepare(settings)
    try:
        app = build(settings)
        serve(app, app.title, settings)
    except known as error:
        print(f"{kind.model_config.get('cli_prog_name')}: error: {error}", file=sys.stderr)
        return 2
    return 0
