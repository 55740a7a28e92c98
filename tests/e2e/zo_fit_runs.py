"""What the tests of `zo_fit` as a process share: a hospital that counts, and what is known of a run from outside."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from fastapi import FastAPI
from torch import Tensor, nn

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig, build_victim
from training.data.phantoms import BRAIN_LABELS
from training.fit.checkpoint import Checkpoint

SIZE = "32"
WAIT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"timed out waiting for {what}")


class Counting(nn.Module):
    """A classifier that counts the images it was shown."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.model(images)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serves an application in a thread of this process, on a socket; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving_hospital(model: nn.Module, config: VictimConfig) -> Iterator[str]:
    """A hospital in a thread of this process; its URL."""
    with serving(make_hospital(model, config, HospitalSettings(model=Path("unused"), device="cpu"))) as url:
        yield url


@contextmanager
def counting_hospital() -> Iterator[tuple[str, Counting]]:
    """A hospital that knows how many images it was really asked about."""
    config = VictimConfig(labels=BRAIN_LABELS, size=(32, 32), width=0.125)
    model = Counting(build_victim(config).eval())
    with serving_hospital(model, config) as url:
        yield url, model


def step_of(out: Path) -> int:
    if not (out / "checkpoint.safetensors").exists():
        return -1
    step: int = Checkpoint.load(out).state["step"]
    return step
