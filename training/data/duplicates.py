"""Near-duplicate groups of any set of images: what must not cross a split.

Public image sets hold the same picture several times: stored twice, re-encoded, or with another brightness or contrast.
Two images are near-duplicates when their thumbnails (grey, 32 x 32, each pixel the mean of its box, so that a
re-encoding leaves no trace) have a Pearson correlation above 0.999. The correlation does not see brightness and
contrast; the grid of 1024 numbers still sees a neighbouring slice of the same patient, which is no duplicate.
Groups are the connected components: a copy of a copy belongs to the same group. Labels and file names play no part.

On the brain MRI set this gives exactly the published list of groups, and there the choice is sharp: at 16 or 64 pixels
a side, with another interpolation or at another threshold, some groups differ.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

THUMBNAIL: Final = 32
THRESHOLD: Final = 0.999

_LUMA: Final = (0.299, 0.587, 0.114)  # ITU-R 601
_FLAT: Final = 1e-6  # standard deviation below which an image has no structure to correlate
_BLOCK: Final = 2048


def grey(images: Tensor) -> Tensor:
    """Reduces images (N,3,H,W) to their ITU-R 601 luma, (N,1,H,W)."""
    return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def thumbnails(images: Tensor) -> Tensor:
    """Reduces images to grey thumbnails of box means.

    Args:
        images: (N,C,H,W) float32, C 1 or 3. Sides that are multiples of 32 give equal boxes.

    Returns:
        (N,32,32) float32.
    """
    if images.shape[1] == 3:
        images = grey(images)
    return F.adaptive_avg_pool2d(images, THUMBNAIL).squeeze(1)


def duplicate_groups(thumbs: Tensor, threshold: float = THRESHOLD) -> npt.NDArray[np.int64]:
    """Finds the groups of near-duplicates: (N,) group numbers, from 0, in order of each group's first image.

    Flat images, whose correlation is undefined, are near-duplicates of each other and of nothing else.

    Args:
        thumbs: (N,h,w), from `thumbnails`.
        threshold: Pearson correlation above which two images are near-duplicates.
    """
    count = len(thumbs)
    vectors = _unit_vectors(thumbs.flatten(1))
    firsts, seconds = [], []
    for start in range(0, count, _BLOCK):
        rows = vectors[start : start + _BLOCK]
        for other in range(start, count, _BLOCK):
            pairs = (rows @ vectors[other : other + _BLOCK].T > threshold).nonzero()
            firsts.append(pairs[:, 0] + start)
            seconds.append(pairs[:, 1] + other)
    if not firsts:
        return np.zeros(0, dtype=np.int64)
    first, second = torch.cat(firsts).numpy(), torch.cat(seconds).numpy()
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    _, components = connected_components(graph, directed=False)
    _, where, inverse = np.unique(components, return_index=True, return_inverse=True)
    rank = np.empty(len(where), dtype=np.int64)
    rank[np.argsort(where)] = np.arange(len(where))
    return rank[inverse]


def _unit_vectors(pixels: Tensor) -> Tensor:
    """Centres and scales (N,D) so that scalar products are correlations.

    The constant vector is orthogonal to every centred one, and so stands for the flat images.
    """
    centred = pixels - pixels.mean(1, keepdim=True)
    flat = centred.square().mean(1, keepdim=True).sqrt() < _FLAT
    return F.normalize(torch.where(flat, torch.ones_like(centred), centred), dim=1)
