"""Images that the model gets right, and the same attacked so that it does not."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from defense.attacks import craft
from training.data.datasets import ImageSet
from training.measure.scoring import main_score
from training.victim.in_process import InProcessVictim

TRIED: Final = 64
"""How many images to try."""

_WORSE: Final = 0.3
"""By how much the score of an image has to fall: a class is lost altogether, a mask by so much Dice."""


def attacked_samples(
    victim: InProcessVictim, chosen: ImageSet, names: Sequence[str], *, epsilon: float, each: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of images (C,H,W) in 256 levels, clean and attacked, by names such as "glioma-1".

    The attack is PGD on the bare victim with L-inf size `epsilon` in units of [0,1]; of each class there are at most
    `each` images on which it makes the victim answer worse.
    """
    images, labels, device = _rounded(chosen.images), chosen.labels, victim.device
    crafted = craft("pgd", victim.model, images.to(device), labels.to(device), epsilon, seed=seed)
    attacked = _rounded(crafted.cpu())
    with torch.no_grad():
        right, wrong = (main_score(victim(shown).argmax(1), labels) for shown in (images, attacked))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, int] = {}
    for index in ((right - wrong) >= _WORSE).nonzero().squeeze(1).tolist():
        kind = names[int(labels[index])] if labels.ndim == 1 else names[-1]
        if counts.get(kind, 0) < each:
            counts[kind] = counts.get(kind, 0) + 1
            found[f"{kind}-{counts[kind]}"] = images[index], attacked[index]
    return found


def _rounded(images: Tensor) -> Tensor:
    """Rounds to 256 levels, as in a file."""
    return torch.round(images * 255) / 255
