"""Subspaces of image space in which a few directions see much of the gradient."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.autoencoders import Autoencoder
from defense.estimators.base import Loss
from defense.estimators.directions import sample_directions


def low_frequencies(shape: tuple[int, int, int], side: int) -> Tensor:
    """The lowest frequencies of an image: the type-II discrete cosine transform's first rows and columns.

    Args:
        shape: (C, H, W).
        side: Frequencies along each axis.

    Returns:
        (C side^2, C H W) orthonormal rows, the lowest frequencies first, for `FixedSpan`.

    Raises:
        ValueError: There are not so many frequencies.
    """
    channels, height, width = shape
    if not 1 <= side <= min(height, width):
        raise ValueError(f"images of {height} x {width} have 1 to {min(height, width)} frequencies, not {side}")
    vertical, horizontal = cosine_basis(height, side), cosine_basis(width, side)
    plane = torch.einsum("ah,bw->abhw", vertical, horizontal).reshape(side * side, height * width)
    rows: Tensor = torch.kron(torch.eye(channels), plane)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    frequency = places.square().sum(1).repeat(channels)
    return rows[frequency.argsort(stable=True)]


def cosine_basis(length: int, count: int) -> Tensor:
    """The first `count` orthonormal rows of the type-II discrete cosine transform: (count, length)."""
    places = (torch.arange(length) + 0.5) * math.pi / length
    rows = torch.cos(torch.arange(count).unsqueeze(1) * places) * math.sqrt(2 / length)
    rows[0] /= math.sqrt(2)
    return rows


@dataclass(frozen=True)
class FixedSpan:
    """The span of given vectors: low frequencies, or principal components of images or of denoising residuals.

    Attributes:
        rows: (r, d) orthonormal.
    """

    rows: Tensor

    def __call__(self, z: Tensor, loss: Loss) -> Tensor:
        """(r, d), the same for all points."""
        return self.rows.to(z.device)


@dataclass(frozen=True)
class SurrogateSpan:
    """The leading principal directions of the surrogate's gradients at the batch's own points.

    What makes one image's loss change is a good guess of what changes another's.

    Attributes:
        rank: r; at most the images in a batch.
    """

    rank: int

    def __call__(self, z: Tensor, loss: Loss) -> Tensor:
        """(r, d), the same for all points.

        Raises:
            ValueError: There are fewer images than dimensions.
        """
        if len(z) < self.rank:
            raise ValueError(f"{len(z)} gradients span no {self.rank} dimensions: lower the rank or raise the batch")
        gradients = loss.surrogate_gradient(z).flatten(1)
        basis: Tensor = torch.linalg.svd(gradients, full_matrices=False).Vh
        return basis[: self.rank]


@dataclass(frozen=True)
class DecoderTangents:
    """Directions in which a small change of the code moves the reconstruction: the span of the decoder's Jacobian.

    The code as a search space, not as the image's path: the image itself is never reconstructed. Orthonormal within an
    image's set, but not isotropic in the span.

    Attributes:
        autoencoder: Pre-trained; its encoder says at which code to differentiate its decoder.
        sampling: None: these are not isotropic.
    """

    autoencoder: Autoencoder
    sampling: None = None

    def dimension(self, whole: int) -> int:
        """The code's."""
        return self.autoencoder.code_dimension

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        with torch.no_grad():
            codes = self.autoencoder.encode(z.detach())
            inside = sample_directions(len(z), count, codes[0].numel(), "orthonormal", generator).to(z.device)
            at = codes.repeat_interleave(count, dim=0)
            moved: Tensor = torch.func.jvp(self.autoencoder.decode, (at,), (inside.reshape(at.shape),))[1]
        tangents = moved.flatten(1).view(len(z), count, -1)
        basis: Tensor = torch.linalg.qr(tangents.transpose(1, 2)).Q
        signs = 2.0 * torch.randint(2, (len(z), 1, count), generator=generator) - 1  # as in `sample_directions`
        return (basis * signs.to(z.device)).transpose(1, 2)

    def energy(self, slopes: Tensor, whole: int) -> Tensor:
        """See `Directions`; as if they were isotropic in the span."""
        return self.dimension(whole) * slopes.square().mean(1)
