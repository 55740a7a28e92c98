"""What answers are worth, image by image: accuracy of classes; Dice and IoU of masks, small lesions apart."""

from typing import Final

import torch
from torch import Tensor

from training.data.lesions import small_lesions
from training.measure.segmentation import dice, iou

ACCURACY: Final = "accuracy"
DICE: Final = "dice"
SMALL: Final = "dice_small"
TITLES: Final = {ACCURACY: "Accuracy", DICE: "Dice", SMALL: "Dice of lesions under a twentieth of the image"}
"""Of the metrics that are printed."""


def main_metric(labels: Tensor) -> str:
    """The metric by which defenses are compared: of classes (N,) the accuracy, of masks (N, H, W) the Dice."""
    return ACCURACY if labels.ndim == 1 else DICE


def main_score(answers: Tensor, labels: Tensor) -> Tensor:
    """(N,) float64 score of each image by `main_metric`."""
    return ((answers == labels) if labels.ndim == 1 else dice(answers, labels)).double()


def scores(answers: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """All metrics of answers (N,) or (N,H,W), the main one first: float64, a number for each image concerned.

    "accuracy"; or "dice", "iou", and "dice_small" if any lesion is small.
    """
    found = {main_metric(labels): main_score(answers, labels)}
    if labels.ndim > 1:
        found["iou"] = iou(answers, labels).double()
        small = small_lesions(labels)
        if small.any():
            found[SMALL] = found[DICE][small]
    return found


def worst_case(answer: Tensor, mask: Tensor) -> tuple[float, float]:
    """Dice and IoU of one (H, W) answer in which every abstaining pixel (-1) is wrong.

    For either metric the worst is background where the lesion is, and lesion where it is not.
    """
    wrong = torch.where(mask > 0, 0, 1)
    settled = torch.where(answer < 0, wrong, answer)
    return dice(settled[None], mask[None]).item(), iou(settled[None], mask[None]).item()
