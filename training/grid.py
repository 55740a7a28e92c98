r"""Shows what an attack does to a model, and what the sanitizer makes of it: one row an image, one PNG.

    python -m training.grid --data ../shared/data/kvasir_seg --victim artifacts/kvasir_seg/victim \
        --artifact artifacts/kvasir_seg/local --epsilon 4 --out artifacts/kvasir_seg/grid.png

Columns: the image; the amplified PGD perturbation made for the bare victim; the attacked image; the same sanitized; the
amplified change by the sanitizer; and the victim's answers on the clean, the attacked and the sanitized attacked image,
beside the truth. The victim runs in this process. Validation images, unless --split test: a picture is no result.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from defense.artifact import load_artifact
from defense.files import replace_file
from services.device import resolve_device
from training.command.config import DeviceConfig
from training.command.errors import UserError
from training.command.verb import run
from training.data.config import DataConfig
from training.data.datasets import load_data
from training.measure.config import Split
from training.measure.selection import chosen_images
from training.reporting.grid import draw_grid
from training.victim.in_process import in_process


class GridConfig(DataConfig, DeviceConfig):
    """Shows what an attack does to a model, and what the sanitizer makes of it: one row an image, one PNG."""

    victim: Path = Field(Path("artifacts/victim"), description="the victim's weights")
    artifact: Path = Field(description="the sanitizer, as zo_fit or pretrain wrote it")
    split: Split = Field("validation", description="images to use")
    images: PositiveInt = Field(4, description="how many")
    epsilon: PositiveFloat = Field(4.0, description="size of the attack in 1/255")
    amplify: PositiveFloat = Field(4.0, description="of what the sanitizer changed")
    out: Path = Field(Path("artifacts/grid.png"), description="the PNG")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.grid") -> int:
    """Runs the verb."""
    return run(_draw, GridConfig, argv, prog=prog)


def _draw(config: GridConfig) -> int:
    device = resolve_device(config.device)
    splits = load_data(config)
    sanitizer = load_artifact(config.artifact).sanitizer.to(device).eval()
    _, chosen = chosen_images(splits, config.split, config.images, config.seed)
    if tuple(chosen.images.shape[1:]) != sanitizer.config.input.dimensions:
        raise UserError(f"{config.artifact} takes other images: use its --size and --channels")
    title = f"{splits.name}, {config.split}"
    with in_process(config.victim, device, splits) as victim:
        picture = draw_grid(
            victim,
            sanitizer,
            chosen,
            labels=splits.labels,
            title=title,
            epsilon=config.epsilon / 255,
            amplify=config.amplify,
            seed=config.seed,
        )
    replace_file(config.out, picture)
    print(f"wrote {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
