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
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError

from defense.files import replace_file
from services.device import resolve_device
from services.hospital.model import VictimConfig, build_victim
from services.hospital.networks import Depth
from services.protocol.images import encode_png
from training.command import cli
from training.command.errors import UserError
from training.command.provenance import settings_of, versions
from training.data.datasets import load_data, settle
from training.victim.files import EXAMPLE_NAME, REPORT_NAME, save_victim
from training.victim.fitting import fit
from training.victim.tasks import TASKS, Classification


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
