r"""Shows what an attack does to a model, and what the sanitizer makes of it: one row an image, one PNG.

    python -m training.grid --data ../shared/data/kvasir_seg --victim artifacts/kvasir_seg/victim \
        --artifact artifacts/kvasir_seg/local --epsilon 4 --out artifacts/kvasir_seg/grid.png

Columns: the image; the perturbation that PGD made for the bare victim, amplified; the attacked image; the same
sanitized; what the sanitizer changed of it, amplified; and the victim's answer on the clean image, on the attacked one,
and on the sanitized attacked one, beside the truth. The victim runs in this process: its weights are the attacker's.
Validation images, unless --split test is asked for: a picture is no result.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
import torch
from torch import Tensor

mpl.use("Agg")  # files only; there may be no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from defense.artifact import load_artifact
from defense.attacks import craft
from defense.files import replace_file
from services.device import resolve_device
from training.command.cli import add_data_arguments, add_device_argument, positive_float, positive_int, run
from training.command.errors import UserError
from training.data.datasets import Splits, load_data
from training.measure.segmentation import dice
from training.measure.selection import chosen_images
from training.victim.in_process import in_process

_AMPLIFIED: Final = 0.5  # what the largest change is drawn as, either side of grey
_TRUTH, _ANSWER = "#009E73", "#D55E00"  # of Okabe and Ito: told apart by people with the common colour blindnesses
_DPI: Final = 110


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb."""
    return run(_draw, build_parser(), argv)


def _draw(arguments: argparse.Namespace) -> int:
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    sanitizer = load_artifact(arguments.artifact).sanitizer.to(device).eval()
    _, chosen = chosen_images(splits, arguments.split, arguments.images, arguments.seed)
    if tuple(chosen.images.shape[1:]) != sanitizer.config.input.dimensions:
        raise UserError(f"{arguments.artifact} takes other images: use its --size and --channels")
    images, epsilon = chosen.images.to(device), arguments.epsilon / 255
    with in_process(arguments.victim, device, splits) as victim:
        attacked = craft("pgd", victim.model, images, chosen.labels.to(device), epsilon, seed=arguments.seed)
        with torch.no_grad():
            sanitized = sanitizer(attacked)
            answers = [victim(shown).argmax(1).cpu() for shown in (images, attacked, sanitized)]
    perturbation, change = (attacked - images).cpu(), (sanitized - attacked).cpu()
    pictures = {
        "image": chosen.images,
        f"perturbation × {_AMPLIFIED / epsilon:.0f}": 0.5 + _AMPLIFIED / epsilon * perturbation,
        f"attacked, {arguments.epsilon:g}/255": attacked.cpu(),
        "sanitized": sanitized.cpu(),
        f"changed by it × {arguments.amplify:g}": 0.5 + arguments.amplify * change,
    }
    heads = ("answer, clean", "answer, attacked", "answer, sanitized")
    count = len(chosen)
    columns = len(pictures) + len(heads)
    size = (1.75 * columns, 1.95 * count + 0.6)
    figure, panels = plt.subplots(count, columns, figsize=size, squeeze=False, layout="constrained")
    for row in range(count):
        for axes, batch in zip(panels[row], pictures.values(), strict=False):
            _show(axes, batch[row])
        for axes, answer in zip(panels[row][len(pictures) :], answers, strict=True):
            _show(axes, chosen.images[row], faded=True)
            _answer(axes, answer[row], chosen.labels[row], splits)
    for axes, head in zip(panels[0], (*pictures, *heads), strict=True):
        axes.set_title(head, fontsize=8)
    outlines = "; the truth is outlined solid and green, the answer dashed and red" if chosen.labels.ndim > 1 else ""
    figure.suptitle(f"{splits.name}, {arguments.split}: PGD on the bare victim{outlines}", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    plt.close(figure)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(arguments.out, picture.getvalue())
    print(f"wrote {arguments.out}")
    return 0


def _show(axes: Axes, image: Tensor, *, faded: bool = False) -> None:
    pixels = image.clamp(0, 1).movedim(0, 2).numpy()
    if faded:
        pixels = 0.5 + 0.5 * pixels
    grey = pixels.shape[2] == 1
    axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _answer(axes: Axes, answer: Tensor, truth: Tensor, splits: Splits) -> None:
    """Writes the class under a picture, or draws the outlines of both masks into it."""
    if truth.ndim == 0:
        right = answer == truth
        axes.set_xlabel(splits.labels[int(answer)], fontsize=8, color=_TRUTH if right else _ANSWER)
        return
    for mask, colour, style in ((truth, _TRUTH, "solid"), (answer, _ANSWER, "dashed")):
        inside = (mask > 0).float()
        if 0 < inside.mean() < 1:
            axes.contour(inside.numpy(), levels=[0.5], colors=colour, linestyles=style, linewidths=1.3)
    axes.set_xlabel(f"Dice {dice(answer[None], truth[None]).item():.2f}", fontsize=8)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.grid", description=__doc__.partition("\n")[0])
    add_data_arguments(parser)
    add_device_argument(parser)
    add = parser.add_argument
    add("--victim", type=Path, default=Path("artifacts/victim"), help="the victim's weights")
    add("--artifact", type=Path, required=True, help="the sanitizer, as zo_fit or pretrain wrote it")
    add("--split", choices=("validation", "test"), default="validation", help="images to use (default validation)")
    add("--images", type=positive_int, default=4, help="how many (default 4)")
    add("--epsilon", type=positive_float, default=4.0, help="size of the attack in 1/255 (default 4)")
    add("--amplify", type=positive_float, default=4.0, help="of what the sanitizer changed (default 4)")
    add("--out", type=Path, default=Path("artifacts/grid.png"), help="the PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())
