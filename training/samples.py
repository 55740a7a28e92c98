"""Makes images for the gateway's page: some that the model gets right, and the same attacked so that it does not.

    python -m training.samples --data phantom --victim artifacts/phantom/victim --out artifacts/phantom/samples
    python -m services.gateway ... --page-samples artifacts/phantom/samples --page-compare

The attack is PGD on the bare model's weights, rounded to 8 bits. The samples are for showing, not for measuring: they
are chosen because the attack succeeds, and it does not know the gateway.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from defense.files import replace_file
from services.device import resolve_device
from services.protocol.images import encode_png
from training.attack.samples import TRIED, attacked_samples
from training.command.config import DeviceConfig
from training.command.errors import UserError
from training.command.verb import run
from training.data.config import DataConfig
from training.data.datasets import load_data
from training.measure.selection import chosen_images
from training.victim.in_process import in_process


class SamplesConfig(DataConfig, DeviceConfig):
    """Makes images for the page."""

    victim: Path = Field(description="the model's weights, as training.victim_fit wrote")
    epsilon: PositiveFloat = Field(8.0, description="size of the attack in 1/255")
    each: PositiveInt = Field(2, description="images of each class")
    out: Path = Field(description="folder for the images")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.samples") -> int:
    """Runs the verb."""
    return run(_make, SamplesConfig, argv, prog=prog)


def _make(config: SamplesConfig) -> int:
    device = resolve_device(config.device)
    splits = load_data(config)
    _, chosen = chosen_images(splits, "test", TRIED, config.seed)
    with in_process(config.victim, device, splits) as victim:
        samples = attacked_samples(
            victim, chosen, splits.labels, epsilon=config.epsilon / 255, each=config.each, seed=config.seed
        )
    if not samples:
        raise UserError(f"no attack of size {config.epsilon:g}/255 succeeds on this model: raise --epsilon")
    for name, (image, attacked) in samples.items():
        replace_file(config.out / f"{name}.png", encode_png(image.numpy()))
        replace_file(config.out / f"{name}.attacked.png", encode_png(attacked.numpy()))
    print(f"wrote {len(samples)} images and their attacked twins to {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
