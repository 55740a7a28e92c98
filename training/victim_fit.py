"""Trains the hospital's classifier: the model that nobody may open.

    python -m training.victim_fit --data phantom --out artifacts/victim
    python -m training.victim_fit --data ../shared/data/brain_mri --out artifacts/victim

Ordinary supervised training without any defence, on splits that no near-duplicate crosses. The epoch with the best
validation accuracy is kept; the test images are classified once, at the end. Writes `model.safetensors`,
`report.json`, and `example.png`, a test image to try a service with.
"""

import argparse
import copy
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from defense.files import replace_file
from services.device import resolve_device
from services.hospital.model import FILE_NAME, VictimConfig, build_victim, victim_bytes
from services.protocol.images import encode_png
from training import cli
from training.datasets import ImageSet, Splits, load_data
from training.provenance import settings_of, versions

REPORT_NAME: Final = "report.json"
EXAMPLE_NAME: Final = "example.png"

_DEPTHS: Final = get_args(VictimConfig.model_fields["depth"].annotation)
_BATCH: Final = 64
_SCORING_BATCH: Final = 256
_LEARNING_RATE: Final = 4e-3
_WEIGHT_DECAY: Final = 0.02
_AVERAGING: Final = 0.99  # share of the averaged weights that a step keeps
_MAX_ANGLE: Final = math.radians(12)
_MAX_SCALE: Final = 0.1
_MAX_SHIFT: Final = 0.08  # of half the side
_MAX_CONTRAST: Final = 0.15

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """How a model does on a set of images.

    Attributes:
        accuracy: Share of images classified rightly.
        loss: Mean cross-entropy in nats.
        correct: (K,) rightly classified images of each class.
        count: (K,) images of each class.
    """

    accuracy: float
    loss: float
    correct: tuple[int, ...]
    count: tuple[int, ...]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Varies pose and contrast as between two scanners: flip, rotation, scale, shift, contrast, each image its own.

    Args:
        images: (N,C,H,W) in [0,1].
        generator: Source of randomness, on the CPU.

    Returns:
        (N,C,H,W) in [0,1], black where the new frame shows what the old one did not.
    """
    count = len(images)
    draws = (torch.rand((6, count), generator=generator) * 2 - 1).to(images.device)
    angle, scale = draws[0] * _MAX_ANGLE, 1 + draws[1] * _MAX_SCALE
    flip = torch.where(draws[2] < 0, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (cosine * flip, -sine, draws[3] * _MAX_SHIFT, sine * flip, cosine, draws[4] * _MAX_SHIFT)
    pose = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = F.affine_grid(pose, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved * (1 + draws[5] * _MAX_CONTRAST).view(-1, 1, 1, 1)).clamp(0, 1)


@torch.inference_mode()
def score(model: nn.Module, data: ImageSet, classes: int, device: torch.device) -> Score:
    """Classifies every image, with the model in evaluation mode."""
    model.eval()
    batches = [model(batch.to(device)).float().cpu() for batch in data.images.split(_SCORING_BATCH)]
    logits = torch.cat(batches)
    right = data.labels[logits.argmax(1) == data.labels]
    correct = torch.bincount(right, minlength=classes).tolist()
    count = torch.bincount(data.labels, minlength=classes).tolist()
    loss = F.cross_entropy(logits, data.labels).item()
    return Score(len(right) / len(data), loss, tuple(correct), tuple(count))


def fit(model: nn.Module, splits: Splits, *, epochs: int, seed: int, device: torch.device) -> int:
    """Trains the model in place and leaves it as it was at its best epoch.

    AdamW with a one-cycle learning rate. What is validated and kept is the exponential average of the weights over the
    last hundred steps or so: the weights themselves swing by many per cent from one epoch to the next. The best epoch
    is that of the highest validation accuracy, of several the one with the lowest validation loss.

    Args:
        model: On `device`.
        splits: The test part is not looked at.
        epochs: Passes over the training images.
        seed: Order of the images and augmentation.
        device: Where to train.

    Returns:
        The best epoch, from 1.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = len(splits.labels)
    images, labels = splits.train.images.to(device), splits.train.labels.to(device)
    steps = math.ceil(len(images) / _BATCH)
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
            loss = F.cross_entropy(model(augment(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            total += loss.item() * len(chosen)
        validation = score(averaged.module, splits.validation, classes, device)
        rank = (validation.accuracy, -validation.loss)
        if rank > best_rank:
            best_rank, best_epoch, best_state = rank, epoch, copy.deepcopy(averaged.module.state_dict())
        _log.info(
            "epoch %d/%d: training loss %.3f, validation loss %.3f, accuracy %.1f%%%s",
            epoch,
            epochs,
            total / len(images),
            validation.loss,
            100 * validation.accuracy,
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
        raise cli.UserError(f"{path} is no report of victim_fit: train the victim again, or remove it") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.victim_fit", description="Train the black box.")
    cli.add_data_arguments(parser)
    cli.add_device_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts/victim"), help="folder to write to")
    parser.add_argument("--width", type=cli.positive_float, default=0.125, help="share of VGG's channels, at most 1")
    parser.add_argument("--depth", choices=_DEPTHS, default="vgg11", help="which VGG (default vgg11)")
    parser.add_argument("--epochs", type=cli.positive_int, default=30, help="passes over the images (default 30)")
    return cli.run(_run, parser, argv)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    device = resolve_device(arguments.device)
    torch.manual_seed(arguments.seed)
    settings = {
        "channels": arguments.channels,
        "size": (arguments.size, arguments.size),
        "width": arguments.width,
        "depth": arguments.depth,
    }
    _configure(("first", "second"), settings)  # refuses bad settings before the images are read
    splits = load_data(arguments)
    config = _configure(splits.labels, settings)
    model = build_victim(config).to(device).to(memory_format=torch.channels_last)
    best_epoch = fit(model, splits, epochs=arguments.epochs, seed=arguments.seed, device=device)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    scores = {title: score(model, parts[title], len(splits.labels), device) for title in ("validation", "test")}
    report = {
        "data": splits.name,
        "fingerprint": splits.fingerprint,
        "config": config.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": settings_of(arguments),
        "best_epoch": best_epoch,
        "images": {title: len(part) for title, part in parts.items()},
        **{title: _score_report(result, splits.labels) for title, result in scores.items()},
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
    path = save_victim(arguments.out, model, config)
    replace_file(arguments.out / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
    replace_file(arguments.out / EXAMPLE_NAME, encode_png(splits.test.images[0].numpy()))
    _print_score(scores["test"], splits.labels)
    print(f"Written: {path}, {REPORT_NAME} and {EXAMPLE_NAME}, after {report['seconds']} s")
    return 0


def _configure(labels: tuple[str, ...], settings: dict[str, Any]) -> VictimConfig:
    try:
        return VictimConfig(labels=labels, **settings)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{problem['loc'][0]}: " if problem["loc"] else ""
        raise cli.UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from error


def _score_report(result: Score, labels: Sequence[str]) -> dict[str, Any]:
    classes = {
        label: {"accuracy": correct / count, "correct": correct, "count": count}
        for label, correct, count in zip(labels, result.correct, result.count, strict=True)
    }
    return {"accuracy": result.accuracy, "loss": result.loss, "count": sum(result.count), "classes": classes}


def _print_score(result: Score, labels: Sequence[str]) -> None:
    width = max(map(len, labels))
    for label, correct, count in zip(labels, result.correct, result.count, strict=True):
        print(f"{label:<{width}}  {100 * correct / count:5.1f}%  ({correct} of {count})")
    print(f"{'test':<{width}}  {100 * result.accuracy:5.1f}%  ({sum(result.correct)} of {sum(result.count)})")


if __name__ == "__main__":
    sys.exit(main())
