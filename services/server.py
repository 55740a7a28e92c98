"""What both services share: settings from flags and environment, and serving."""

import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.keys import Access, Keys, Rate
from services.protocol.errors import ServiceError
from services.protocol.logs import LogFormat, set_up
from services.settings import read
from services.tracing import tracing

_GRACE_S = 30
_Settings = TypeVar("_Settings", bound="ServiceSettings")


class ServiceSettings(BaseSettings):
    """Settings that both services have; each is a flag, and an environment variable with the service's prefix."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens the service to the network")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="CPU threads of the device's work; 0 leaves the choice to PyTorch")
    max_batch: int = Field(
        64, ge=1, description="most images in one batch for the device; larger ones leave a CPU's caches"
    )
    max_delay_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="how long a batch waits for more images, in milliseconds; by default while the one before it runs",
    )
    max_queue: int = Field(16384, ge=1, description="images waiting or in work beyond which requests are answered 429")
    deadline_s: float = Field(
        300.0, gt=0, description="most seconds for a request, from its headers to its answer, before it is answered 504"
    )
    decoders: int = Field(2, ge=1, description="processes that decode images, other than small PNGs and JPEGs")
    max_body_mb: int = Field(256, ge=1, description="largest request body in MiB, also when inflated")
    docs: bool = Field(False, description="serve the OpenAPI document at /openapi.json and its page at /docs")
    log_level: Literal["debug", "info", "warning", "error"] = Field("warning", description="what to log to stderr")
    log_format: LogFormat = Field("text", description="how lines of the log look: text, or a JSON object each")
    otlp_endpoint: str | None = Field(
        None, description="send OpenTelemetry traces there, such as http://host:4318/v1/traces (needs the extra otel)"
    )
    keys: Path | None = Field(
        None, description="file of API keys (see python -m services.keys): nobody is answered without one of them"
    )
    rate: float | None = Field(
        None, gt=0, description="images a second that each client may send; by default any number"
    )
    burst: int | None = Field(None, ge=1, description="images that it may send at once; by default a second's")
    open_to_anyone: bool = Field(
        False, description="listen beyond this machine without keys: something else keeps strangers out"
    )
    tls_cert: Path | None = Field(None, description="certificate chain (PEM): serve HTTPS")
    tls_key: Path | None = Field(
        None, description="the certificate's private key (PEM), where it is not in the same file"
    )

    @model_validator(mode="after")
    def _refuse_unsafe(self) -> Self:
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("--tls-key needs --tls-cert, the certificate that it belongs to")
        if self.burst is not None and self.rate is None:
            raise ValueError("--burst needs --rate, which it is an exception from")
        if not (_is_loopback(self.host) or self.keys or self.open_to_anyone):
            raise ValueError(
                f"--host {self.host} lets everybody ask who reaches this machine: give --keys FILE, or say "
                "--open-to-anyone if something else keeps strangers out"
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        """The bound on the request body in bytes."""
        return self.max_body_mb * 2**20


def access_of(settings: ServiceSettings, name_of: Callable[[str | None], str]) -> Access:
    """A service's access control; without keys, `name_of` names clients. Raises InvalidInput if the file is bad."""
    keys = None if settings.keys is None else Keys.load(settings.keys)
    return Access(keys, Rate.of(settings.rate, settings.burst), name_of)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(kind: type[_Settings], argv: Sequence[str] | None, prog: str | None = None) -> _Settings:
    """`services.settings.read` of a service's settings; its `cli_prog_name` names the program by default."""
    return read(kind, argv, prog=prog or str(kind.model_config.get("cli_prog_name")))


def prepare(settings: ServiceSettings) -> None:
    """Sets up the process's logging and threads."""
    set_up(settings.log_level, settings.log_format)
    if settings.threads:
        torch.set_num_threads(settings.threads)


def serve(app: FastAPI, name: str, settings: ServiceSettings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests end; prints the URL to stdout once it listens.

    Raises OSError if the address cannot be bound.
    """
    is_v6 = ":" in settings.host
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family, backlog=1024) as listener:
        host = f"[{settings.host}]" if is_v6 else settings.host
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        config.load()  # a certificate that cannot be used is told before anything is announced
        scheme = "https" if config.is_ssl else "http"
        print(f"{name} listening on {scheme}://{host}:{listener.getsockname()[1]}", flush=True)
        # uvicorn ends what it serves, and then raises the signal once more. Left to itself, SIGTERM would end the
        # process there and then, and whatever else has to be closed would not be.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def run_service(
    kind: type[_Settings],
    build: Callable[[_Settings], FastAPI],
    argv: Sequence[str] | None,
    *,
    prog: str | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Runs a service until terminated. Returns the exit code: 0, or 2 after one line on stderr.

    Args:
        kind: the settings class.
        build: makes the application; its title names the service.
        argv: the arguments without the program's name; `sys.argv[1:]` when None.
        prog: the program, as messages name it; the settings' `cli_prog_name` by default.
        errors: further exceptions of `build`, beside `ServiceError` and `OSError`, that are not bugs.

    Raises:
        SystemExit: as `read_settings`.
    """
    known: tuple[type[Exception], ...] = (ServiceError, OSError, *errors)
    settings = read_settings(kind, argv, prog)
    prepare(settings)
    try:
        app = build(settings)
        with tracing(app, settings.otlp_endpoint):
            serve(app, app.title, settings)
    except known as error:
        print(f"{prog or kind.model_config.get('cli_prog_name')}: error: {error}", file=sys.stderr)
        return 2
    return 0
