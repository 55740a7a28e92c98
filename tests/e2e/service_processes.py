"""What the end-to-end tests share: the two services as people run them, as processes on ports of their own choosing."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from defense.artifact import Provenance, save_artifact
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from services.hospital.model import VictimConfig

CONFIG = VictimConfig(labels=("a", "b", "c"), channels=1, size=(32, 32), width=0.125)
SHAPE = ImageShape(channels=1, height=32, width=32)


class Process(subprocess.Popen[str]):
    """A service's process. Its errors go to a file: a pipe that nobody reads would hold it up when full."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            super().__init__(command, stdout=subprocess.PIPE, stderr=file, text=True)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        assert self.stdout is not None
        self.stdout.close()
        return "", self.log.read_text()


Start = Callable[..., tuple[Process, str]]


def publish(folder: Path, seed: int, labels: Sequence[str] = CONFIG.labels) -> Sanitizer:
    """Writes an artifact."""
    torch.manual_seed(seed)
    sanitizer = Sanitizer(SanitizerConfig(input=SHAPE, denoiser="dncnn-small", autoencoder=None)).eval()
    save_artifact(
        folder,
        sanitizer,
        name="ours",
        labels=list(labels),
        sigma=0.25,
        queries={"train": 7},
        provenance=Provenance(
            method="mse", estimator=None, data="noise", data_fingerprint="0", settings={}, versions={}, validation={}
        ),
    )
    return sanitizer


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def stop(process: Process) -> str:
    """Ends a service as an init system does; gives what it wrote to stderr, but for the line that it is loading."""
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors.partition("\n")[0].endswith(": loading ...")
    return errors.partition("\n")[2]
