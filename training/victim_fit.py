"""Trains the hospital's model: the one that nobody may open.

    python -m training.victim_fit --data phantom --out artifacts/victim
    python -m training.victim_fit --data ../shared/data/brain_mri --out artifacts/victim
    python -m training.victim_fit --task segmentation --data phantom --out artifacts/victim
    python -m training.victim_fit --data ../shared/data/kvasir_seg --out artifacts/victim

Supervised training without any defense: a VGG to classify, a U-Net to segment. The epoch with the best validation
accuracy or mean Dice is kept; test images are used once, at the end. Writes `model.safetensors`, `report.json`, and the
test image `example.png`.

`report.json` holds data, configuration, settings and versions, and for `validation` and `test` each: `loss`, `count` of
images; of a classifier `accuracy`, also by `classes`; of a segmenter the means `dice` and `iou` over images,
`median_dice`, and in `small_lesions` these and `count` for lesions under 5% of their image.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from services.device import resolve_device
from services.hospital.model import VictimConfig, build_victim
from services.hospital.networks import Depth
from training.command.config import DeviceConfig
from training.command.provenance import versions
from training.command.verb import run
from training.data.config import DataConfig
from training.data.datasets import load_data, settled
from training.victim.files import EXAMPLE_NAME, REPORT_NAME, save_example, save_report, save_victim
from training.victim.fitting import fit
from training.victim.tasks import TASKS, Classification


def _by_task(name: str) -> str:
    """What --help says of a default that depends on the task."""
    return ", ".join(f"{getattr(task, name)} for {title}" for title, task in TASKS.items())


class VictimFitConfig(DataConfig, DeviceConfig):
    """Trains the black box."""

    out: Path = Field(Path("artifacts/victim"), description="folder to write to")
    width: PositiveFloat | None = Field(
        None, description=f"share of the network's channels, at most 1 (default {_by_task('width')})"
    )
    depth: Depth | None = Field(None, description=f"which VGG, to classify (default {Classification.depth})")
    epochs: PositiveInt | None = Field(None, description=f"passes over the images (default {_by_task('epochs')})")

    def settled(self) -> "VictimFitConfig":
        """The same with what depends on data and task filled in."""
        config = settled(self)
        kind = TASKS[config.task or "classification"]
        told = {name: getattr(config, name) or getattr(kind, name) for name in ("width", "depth", "epochs")}
        return config.model_copy(update=told)

    def victim(self, labels: Sequence[str]) -> VictimConfig:
        """The victim that is trained, once settled.

        Raises:
            ValidationError: There is no such victim.
        """
        size = (self.size, self.size)
        told = {name: getattr(self, name) for name in ("task", "channels", "width", "depth")}
        return VictimConfig(labels=tuple(labels), size=size, **told)


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.victim_fit") -> int:
    """Runs the verb; returns the exit code."""
    return run(_fit, VictimFitConfig, argv, prog=prog)


def _fit(config: VictimFitConfig) -> int:
    started = time.monotonic()
    device = resolve_device(config.device)
    torch.manual_seed(config.seed)
    config = config.settled()
    config.victim(("first", "second"))  # refuses bad settings before the images are read
    splits = load_data(config)
    task = TASKS[splits.task](splits.labels)
    victim = config.victim(splits.labels)
    model = build_victim(victim).to(device).to(memory_format=torch.channels_last)
    assert config.epochs is not None  # it is settled
    best_epoch = fit(model, task, splits, epochs=config.epochs, seed=config.seed, device=device)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    scores = {title: task.score(model, parts[title], device) for title in ("validation", "test")}
    seconds = round(time.monotonic() - started, 1)
    path = save_victim(config.out, model, victim)
    save_report(
        config.out,
        {
            "data": splits.name,
            "fingerprint": splits.fingerprint,
            "config": victim.model_dump(mode="json"),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "settings": config.model_dump(mode="json"),
            "best_epoch": best_epoch,
            "images": {title: len(part) for title, part in parts.items()},
            **{title: score.report() for title, score in scores.items()},
            "versions": versions(*task.libraries),
            "seconds": seconds,
        },
    )
    save_example(config.out, splits.test.images[0])
    print(scores["test"].table())
    print(f"Written: {path}, {REPORT_NAME} and {EXAMPLE_NAME}, after {seconds} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
