"""The victim's folder: weights, report, and an image to try a service with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from defense.files import replace_file
from services.hospital.model import FILE_NAME, VictimConfig, victim_bytes
from services.protocol.images import encode_png
from training.command.errors import UserError

REPORT_NAME: Final = "report.json"
EXAMPLE_NAME: Final = "example.png"


def save_victim(folder: Path, model: nn.Module, config: VictimConfig) -> Path:
    """Writes the weights of what `build_victim(config)` built, making the folder where needed; returns the file."""
    path = folder / FILE_NAME
    replace_file(path, victim_bytes(model, config))
    return path


def save_report(folder: Path, report: Mapping[str, object]) -> None:
    """Writes what is known of the victim, JSON values."""
    replace_file(folder / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())


def save_example(folder: Path, image: Tensor) -> None:
    """Writes an image (C,H,W) in [0,1]."""
    replace_file(folder / EXAMPLE_NAME, encode_png(image.numpy()))


def data_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the splits that the victim in a folder was trained on; None if it has no report.

    Raises UserError if the report is not one of `victim_fit`.
    """
    path = folder / REPORT_NAME
    try:
        return str(json.loads(path.read_bytes())["fingerprint"])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no report of victim_fit: train the victim again, or remove it") from error
