"""Trains the hospital's model: the one that nobody may open.

    python -m training.victim_fit --data phantom --out artifacts/victim
    python -m training.victim_fit --data ../shared/data/brain_mri --out artifacts/victim
    python -m training.victim_fit --task segmentation --data phantom --out artifacts/victim
    python -m training.victim_fit --data ../shared/data/kvasir_seg --out artifacts/victim

Ordinary supervised training without any defense, on splits that no near-duplicate crosses: a VGG learns to classify
images, a U-Net to segment them. The epoch with the best validation accuracy, or mean Dice, is kept; the test images are
answered once, at the end. Writes `model.safetensors`, `report.json`, and `example.png`, a test image to try a service
with.

`report.json` holds, beside data, configuration, settings and versions, for `validation` and `test` each: `loss`,
`count` of images, and of a classifier `accuracy` and the same by `classes`; of a segmenter the means `dice` and `iou`
over images, `median_dice`, and in `small_lesions` these and `count` for lesions under 5% of their image.
"""

import argparse
import copy
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from defense.files import replace_file
from services.device import resolve_device
from services.hospital.model import FILE_NAME, VictimConfig, build_victim, victim_bytes
from services.hospital.networks import Depth
from services.protocol.images import encode_png
from training.command import cli
from training.command.errors import UserError
from training.command.provenance import settings_of, versions
from training.data.datasets import Splits, load_data, settle
from training.victim.tasks import TASKS, Classification, VictimTask

REPORT_NAME: Final = "report.json"
EXAMPLE_NAME: Final = "example.png"

_LEARNING_RATE: Final = 4e-3
_WEIGHT_DECAY: Final = 0.02
_AVERAGING: Final = 0.99  # share of the averaged weights that a step keeps

_log = logging.getLogger(__name__)


def fit(model: nn.Module, task: VictimTask, splits: Splits, *, epochs: int, seed: int, device: torch.device) -> int:
    """Trains the model in place and leaves it as it was at its best epoch.

    AdamW with a one-cycle learning rate. What is validated and kept is the exponential average of the weights over the
    last hundred steps or so: the weights themselves swing by many per cent from one epoch to the next. The best epoch
    is that of the highest validation score, of several the one with the lowest validation loss.

    Args:
        model: On `device`.
        task: What it is trained for.
        splits: The test part is not looked at.
        epochs: Passes over the training images.
        seed: Order of the images and augmentation.
        device: Where to train.

    Returns:
        The best epoch, from 1.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = splits.train.images.to(device), splits.train.labels.to(device)
    steps = math.ceil(len(images) / task.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGING), use_buffers=True)
    best_rank, best_epoch, best_state = (-1.0, 0.0), 0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        # Equal chunks: a last batch of one image would break the batch normalisation.
        for chosen in torch.randperm(len(images), generator=generator).tensor_split(steps):
            chosen = chosen.to(device)
            varied, targets = task.augment(images[chosen], labels[chosen], generator)
            loss = task.loss(model(varied), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            total += loss.item() * len(chosen)
        validation = task.score(averaged.module, splits.validation, device)
        if validation.rank > best_rank:
            best_rank, best_epoch, best_state = validation.rank, epoch, copy.deepcopy(averaged.module.state_dict())
        _log.info(
            "epoch %d/%d: training loss %.3f, validation %s%s",
            epoch,
            epochs,
            total / len(images),
            validation,
            " (best)" if best_epoch == epoch else "",
        )
    model.load_state_dict(best_state)
    return best_epoch


def save_victim(folder: Path, model: nn.Module, config: VictimConfig) -> Path:
    """Writes the victim's file whole, making the folder where needed.

    Args:
        folder: The victim's folder.
        model: What `build_victim(config)` built, trained.
        config: Its configuration.

    Returns:
        The path of the file.
    """
    path = folder / FILE_NAME
    replace_file(path, victim_bytes(model, config))
    return path


def data_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the splits on which the victim in `folder` was trained; None where it has no report.

    Raises:
        UserError: There is a report, and it is none of this command's.
    """
    path = folder / REPORT_NAME
    try:
        return str(json.loads(path.read_bytes())["fingerprint"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no report of victim_fit: train the victim again, or remove it") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.victim_fit", description="Train the black box.")
    cli.add_data_arguments(parser)
    cli.add_device_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts/victim"), help="folder to write to")
    parser.add_argument(
        "--width",
        type=cli.positive_float,
        help=f"share of the network's channels, at most 1 (default {_by_task('width')})",
    )
    parser.add_argument(
        "--depth", choices=get_args(Depth), help=f"which VGG, to classify (default {Classification.depth})"
    )
    parser.add_argument(
        "--epochs", type=cli.positive_int, help=f"passes over the images (default {_by_task('epochs')})"
    )
    return cli.run(_run, parser, argv)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    device = resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    settle(arguments)
    kind = TASKS[arguments.task]
    for name in ("width", "depth", "epochs"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(kind, name))
    settings = {
        "task": arguments.task,
        "channels": arguments.channels,
        "size": (arguments.size, arguments.size),
        "width": arguments.width,
        "depth": arguments.depth,
    }
    _configure(("first", "second"), settings)  # refuses bad settings before the images are read
    splits = load_data(arguments)
    config = _configure(splits.labels, settings)
    model = build_victim(config).to(device).to(memory_format=torch.channels_last)
    task = kind(splits.labels)
    best_epoch = fit(model, task, splits, epochs=arguments.epochs, seed=arguments.seed, device=device)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    scores = {title: task.score(model, parts[title], device) for title in ("validation", "test")}
    report = {
        "data": splits.name,
        "fingerprint": splits.fingerprint,
        "config": config.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": settings_of(arguments),
        "best_epoch": best_epoch,
        "images": {title: len(part) for title, part in parts.items()},
        **{title: score.report() for title, score in scores.items()},
        "versions": versions(*task.libraries),
        "seconds": round(time.monotonic() - started, 1),
    }
    path = save_victim(arguments.out, model, config)
    replace_file(arguments.out / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
    replace_file(arguments.out / EXAMPLE_NAME, encode_png(splits.test.images[0].numpy()))
    print(scores["test"].table())
    print(f"Written: {path}, {REPORT_NAME} and {EXAMPLE_NAME}, after {report['seconds']} s")
    return 0


def _by_task(name: str) -> str:
    """What --help says of a default that depends on the task."""
    return ", ".join(f"{getattr(task, name)} for {title}" for title, task in TASKS.items())


def _configure(labels: tuple[str, ...], settings: dict[str, Any]) -> VictimConfig:
    try:
        return VictimConfig(labels=labels, **settings)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{problem['loc'][0]}: " if problem["loc"] else ""
        raise UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from error


if __name__ == "__main__":
    sys.exit(main())
