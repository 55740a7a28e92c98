"""Which masks show a small lesion."""

from typing import Final

from torch import Tensor

SMALL_LESION: Final = 0.05
"""Share of the image below which a lesion is small. Dice forgives small ones least, so they are reported apart."""


def small_lesions(masks: Tensor) -> Tensor:
    """Tells in which images there is a lesion, but a small one.

    Args:
        masks: (N,H,W) int64 true classes.

    Returns:
        (N,) bool: the foreground covers less than `SMALL_LESION` of the image, and something.
    """
    share = (masks != 0).float().mean((1, 2))
    return (share > 0) & (share < SMALL_LESION)
