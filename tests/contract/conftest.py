"""What the contract tests share: a gateway in front of a hospital, on real sockets."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from torch import Tensor, nn

from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig

Defend = Callable[[nn.Module, VictimConfig], str]


class Inverts(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (1 - images).clamp(0, 1)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serves an application from a thread; gives its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def defend() -> Iterator[Defend]:
    """Serves a victim behind a gateway that inverts images; returns the gateway's host and port."""
    with ExitStack() as stack:

        def serve(victim: nn.Module, config: VictimConfig) -> str:
            height, width = config.size
            artifact: Any = SimpleNamespace(
                sanitizer=Inverts(),
                manifest=SimpleNamespace(
                    id="sha256-abc",
                    name="ours",
                    sigma=0.25,
                    queries_spent=1234,
                    labels=list(config.labels),
                    input=SimpleNamespace(channels=config.channels, height=height, width=width),
                ),
            )
            hospital = make_hospital(victim, config, HospitalSettings(model="unused", device="cpu"))
            upstream = stack.enter_context(listening(hospital))
            settings = GatewaySettings(artifact="unused", victim_url=f"http://{upstream}", device="cpu", max_body_mb=1)
            return stack.enter_context(listening(make_gateway(artifact, settings)))

        yield serve
