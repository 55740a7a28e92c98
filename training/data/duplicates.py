"""Near-duplicate groups of any set of images: what must not cross a split.

Public image sets hold the same picture several times: stored twice, re-encoded, or with changed brightness or contrast.
Two images are near-duplicates if their thumbnails (grey, 32 x 32, box means, so that re-encoding leaves no trace) have
a Pearson correlation above 0.999, which ignores brightness and contrast but tells neighbouring slices of a patient
apart. Groups are the connected components; labels and file names play no part.

On the brain MRI set this gives exactly the published list of groups; with 16 or 64 pixels a side, another
interpolation or threshold, some groups differ.
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
    """Reduces images (N,C,H,W) float32, C 1 or 3, to grey box means (N,32,32) float32.

    Boxes are equal if the sides are multiples of 32.
    """
    if images.shape[1] == 3:
        images = grey(images)
    return F.adaptive_avg_pool2d(images, THUMBNAIL).squeeze(1)


def duplicate_groups(thumbs: Tensor, threshold: float = THRESHOLD) -> npt.NDArray[np.int64]:
    """The near-duplicate groups of `thumbnails`: (N,) numbers from 0, in order of each group's first image.

    Images are near-duplicates if their Pearson correlation is above `threshold`; flat images, whose correlation is
    undefined, are near-duplicates of each other only.
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
    """Centres and scales (N,D) so that scalar products are correlations; flat images become the constant vector."""
    centred = pixels - pixels.mean(1, keepdim=True)
    flat = centred.square().mean(1, keepdim=True).sqrt() < _FLAT
    return F.normalize(torch.where(flat, torch.ones_like(centred), centred), dim=1)
