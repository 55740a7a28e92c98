"""Which masks show a small lesion."""

from typing import Final

from torch import Tensor

SMALL_LESION: Final = 0.05
"""Share of the image below which a lesion is small. Dice forgives small ones least, so they are reported apart."""


def small_lesions(masks: Tensor) -> Tensor:
    """(N,) whether masks (N,H,W) show a lesion of less than `SMALL_LESION` of the image."""
    share = (masks != 0).float().mean((1, 2))
    return (share > 0) & (share < SMALL_LESION)
