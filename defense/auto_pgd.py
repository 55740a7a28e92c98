"""Auto-PGD (Croce and Hein, ICML 2020), pyautoattack's: it needs no step size and returns the best image it passed."""

import torch
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from defense.attacks import undisturbed
from defense.objectives import agreement, stability_loss

_NORMS = {"linf": "Linf", "l2": "L2"}
_LEAST = 1e-3  # keeps the logarithm of a loss finite


def auto_pgd(
    norm: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 40,
    seed: int = 0,
    batch: int = 128,
) -> Tensor:
    """Crafts images (N,C,H,W) float32 in [0,1], in the norm "linf" or "l2"; arguments as of `craft`, `epsilon` above 0.

    Returned is an image whose class is wrong, where one was passed, else the one of the largest cross-entropy; of a
    mask the one of the least Dice.
    """
    crafted = []
    with undisturbed(model, images.device, seed):
        for shown, wanted in zip(images.split(batch), labels.split(batch), strict=True):
            dense = wanted.ndim > 1
            attacked = _Graded(model, wanted).eval() if dense else model
            attack = APGDAttack(attacked, n_iter=steps, norm=_NORMS[norm], eps=epsilon, device=images.device)
            attack.init_hyperparam(shown)
            classes = wanted.new_zeros(len(wanted)) if dense else wanted
            best, held, _, wrong = attack.attack_single_run(shown, classes)
            found = best if dense else torch.where((held > 0).view(-1, 1, 1, 1), best, wrong)
            crafted.append(found.detach())
    return torch.cat(crafted)


class _Graded(nn.Module):
    """A segmenter as logits (N,2) of which the cross-entropy with class 0 is one minus the Dice with `masks` (N,H,W).

    Its gradient is that of the loss that segmenters are trained with, which unlike the Dice has one.
    """

    def __init__(self, model: nn.Module, masks: Tensor) -> None:
        super().__init__()
        self._model, self._masks = model, masks

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) -> logits (N,2)."""
        logits = self._model(images)
        loss = stability_loss(logits, self._masks, "logits")
        graded = _LEAST + 1 - agreement(logits.argmax(1), self._masks) + loss - loss.detach()
        return torch.stack([torch.zeros_like(graded), graded.expm1().log()], dim=1)
