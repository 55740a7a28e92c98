"""Pre-trains denoiser and autoencoder on unlabelled images, without a single victim query.

    python -m training.pretrain --data phantom --out artifacts/pretrained
    python -m training.pretrain --data DIR --denoiser dncnn --autoencoder conv --pretrain-steps 20000 --out OUT

Writes two artifacts that a gateway can serve at once, and that `training.zo_fit` starts from: OUT/denoiser and
OUT/denoiser+autoencoder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from services.device import resolve_device
from training.command.config import DeviceConfig
from training.command.verb import run
from training.data.config import DataConfig
from training.data.datasets import load_data, settled
from training.fit.config import PretrainConfig
from training.fit.pretraining import SANITIZERS, pretrain


class Settings(PretrainConfig, DataConfig, DeviceConfig):
    """Pre-trains denoiser and autoencoder on unlabelled images, without a single victim query."""

    out: Path = Field(Path("artifacts/pretrained"), description="folder for the two artifacts")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.pretrain") -> int:
    """Runs the command; returns its exit code."""
    return run(_pretrain, Settings, argv, prog=prog)


def _pretrain(config: Settings) -> int:
    pretrain(settled(config), load_data(config), config.out, resolve_device(config.device))
    print(f"wrote {' and '.join(str(config.out / name) for name in SANITIZERS)}; victim queries spent: 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
