"""A hospital that answers so many images a second and no more, for `benchmarks.scaling`: it waits, and takes no core.

    python -m benchmarks.paced --model artifacts/phantom/victim --rate 800

A hospital on this machine would take the cores that the trainer works on, and no two of them would be faster than one.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import load_victim
from services.server import read_settings, serve


class Paced(nn.Module):
    """A linear classifier of `rate` images a second: how the time is spent is measured, not what is learned."""

    def __init__(self, values: int, classes: int, rate: float) -> None:
        super().__init__()
        weights = torch.randn(values, classes, generator=torch.Generator().manual_seed(0))
        self._weights, self._rate = weights * (3 / values**0.5), rate

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) images to logits (N,K), after N / rate seconds."""
        begun = time.perf_counter()
        logits: Tensor = images.flatten(1) @ self._weights
        time.sleep(max(0.0, len(images) / self._rate - (time.perf_counter() - begun)))
        return logits


def main() -> int:
    """Serves until it is told to end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="whose images and classes it has")
    parser.add_argument("--rate", type=float, required=True, help="images a second")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    _, config = load_victim(given.model)
    values = config.channels * config.size[0] * config.size[1]
    settings = read_settings(HospitalSettings, ["--model", str(given.model), "--port", str(given.port)])
    serve(make_hospital(Paced(values, len(config.labels), given.rate), config, settings), "paced", settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
