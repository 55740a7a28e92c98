"""How well masks agree: Dice and IoU of the foreground, by MONAI, one number an image.

Foreground is every class but 0. All functions take masks of class numbers, (N,H,W) int64, as answers and as truth.
"""

from torch import Tensor


def dice(answers: Tensor, masks: Tensor) -> Tensor:
    """Dice coefficients 2 |A and B| / (|A| + |B|) of classes (N,H,W), (N,) float32 in [0,1]; 1 where both are empty."""
    from monai.metrics import compute_dice  # takes seconds, and most that import this module need no metric

    return compute_dice(_foreground(answers), _foreground(masks), ignore_empty=False).squeeze(1)


def iou(answers: Tensor, masks: Tensor) -> Tensor:
    """Intersections over union of classes (N,H,W), (N,) float32 in [0,1]; 1 where both are empty."""
    from monai.metrics import compute_iou

    return compute_iou(_foreground(answers), _foreground(masks), ignore_empty=False).squeeze(1)


def _foreground(masks: Tensor) -> Tensor:
    """Masks (N,H,W) to one float plane (N,1,H,W): 1 where the class is not 0."""
    return (masks != 0).float().unsqueeze(1)
