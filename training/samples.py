r"""Makes images for the gateway's page: some that the model gets right, and the same attacked so that it does not.

    python -m training.samples --data phantom --victim artifacts/phantom/victim --out artifacts/phantom/samples
    python -m services.gateway ... --page-samples artifacts/phantom/samples --page-compare

The attack is PGD on the bare model's weights, rounded to the 8 bits of the files; kept are images that are answered
worse by it. They are for showing, not for measuring: chosen because the attack succeeds, and blind to the gateway.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from defense.attacks import craft
from defense.files import replace_file
from services.device import resolve_device
from services.protocol.images import encode_png
from training.command.cli import add_data_arguments, add_device_argument, positive_float, positive_int, run
from training.command.errors import UserError
from training.data.datasets import load_data
from training.measure.scoring import main_score
from training.measure.selection import chosen_images
from training.victim.in_process import in_process

_TRIED: Final = 64
_WORSE: Final = 0.3
"""By how much the score of an image has to fall: a class is lost altogether, a mask by so much Dice."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb."""
    return run(_make, build_parser(), argv)


def _make(arguments: argparse.Namespace) -> int:
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    _, chosen = chosen_images(splits, "test", _TRIED, arguments.seed)
    images, labels = _rounded(chosen.images), chosen.labels
    with in_process(arguments.victim, device, splits) as victim:
        epsilon = arguments.epsilon / 255
        crafted = craft("pgd", victim.model, images.to(device), labels.to(device), epsilon, seed=arguments.seed)
        attacked = _rounded(crafted.cpu())
        right, wrong = (main_score(victim(shown).argmax(1).cpu(), labels) for shown in (images, attacked))
    worse = ((right - wrong) >= _WORSE).nonzero().squeeze(1).tolist()
    if not worse:
        raise UserError(f"no attack of size {arguments.epsilon:g}/255 succeeds on this model: raise --epsilon")
    names: dict[str, int] = {}
    for index in worse:
        kind = splits.labels[int(labels[index])] if labels.ndim == 1 else splits.labels[-1]
        if names.get(kind, 0) < arguments.each:
            names[kind] = names.get(kind, 0) + 1
            stem = f"{kind}-{names[kind]}"
            for name, image in ((f"{stem}.png", images[index]), (f"{stem}.attacked.png", attacked[index])):
                replace_file(arguments.out / name, encode_png(image.numpy()))
    print(f"wrote {sum(names.values())} images and their attacked twins to {arguments.out}")
    return 0


def _rounded(images: Tensor) -> Tensor:
    """As they are in a file."""
    return torch.round(images * 255) / 255


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description="Makes images for the page.")
    add_data_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--victim", type=Path, required=True, help="the model's weights, as training.victim_fit wrote")
    parser.add_argument("--epsilon", type=positive_float, default=8.0, help="size of the attack in 1/255 (default 8)")
    parser.add_argument("--each", type=positive_int, default=2, help="images of each class (default 2)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    return parser


if __name__ == "__main__":
    sys.exit(main())
