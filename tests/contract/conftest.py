"""What the contract tests share: a gateway in front of a hospital, on real sockets."""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from torch import Tensor, nn

from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Version
from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig

Defend = Callable[..., str]
Front = Callable[..., str]


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
def front() -> Iterator[Front]:
    """Serves a gateway that inverts images in front of a victim's URL; returns the gateway's host and port."""
    with ExitStack() as stack:

        def serve(victim_url: str, shape: tuple[int, int, int], labels: Sequence[str] = (), **settings: Any) -> str:
            channels, height, width = shape
            artifact: Any = SimpleNamespace(
                sanitizer=Inverts(),
                manifest=SimpleNamespace(
                    id="sha256-abc",
                    name="ours",
                    sigma=0.25,
                    queries_spent=1234,
                    labels=list(labels),
                    input=SimpleNamespace(channels=channels, height=height, width=width),
                ),
            )
            fixed = {"artifact": "unused", "victim_url": victim_url, "device": "cpu", "max_body_mb": 1}
            return stack.enter_context(
                listening(make_gateway(Version("1", artifact), GatewaySettings(**fixed, **settings)))
            )

        yield serve


@pytest.fixture(scope="module")
def defend(front: Front) -> Iterator[Defend]:
    """Serves a victim behind a gateway that inverts images; settings may be changed. Returns its host and port."""
    with ExitStack() as stack:

        def serve(victim: nn.Module, config: VictimConfig, **changes: Any) -> str:
            hospital = make_hospital(victim, config, HospitalSettings(model="unused", device="cpu"))
            upstream = stack.enter_context(listening(hospital))
            return front(f"http://{upstream}", (config.channels, *config.size), config.labels, **changes)

        yield serve
