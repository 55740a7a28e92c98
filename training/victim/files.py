"""The victim's folder: weights, report, and an image to try a service with."""

import json
from pathlib import Path
from typing import Final

from torch import nn

from defense.files import replace_file
from services.hospital.model import FILE_NAME, VictimConfig, victim_bytes
from training.command.errors import UserError

REPORT_NAME: Final = "report.json"
EXAMPLE_NAME: Final = "example.png"


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
