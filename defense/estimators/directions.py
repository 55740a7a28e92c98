"""Where an estimator looks: directions of the whole space, of a subspace of it, or along the surrogate's gradient."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from defense.estimators.base import Loss

Sampling = Literal["sphere", "gaussian", "orthonormal"]

_NEGLIGIBLE = 1e-6


class Directions(Protocol):
    """A way to choose directions.

    `isotropic` says whether E[u u^T] = P / r, P the projector on the r dimensions that are searched; if not, slopes can
    only be combined by projection.
    """

    isotropic: ClassVar[bool]

    def dimension(self, whole: int) -> int:
        """r, the dimensions of what is searched, in a space of `whole` dimensions."""
        ...

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """(N, *shape) points -> (N, count, d) unit directions (Gaussian ones: unit in the mean)."""
        ...


def sample_directions(
    count: int, directions: int, dimension: int, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Draws (N, q, d) float32: `count` sets of random directions u of R^d, scaled so that E[u u^T] = I / d.

    "sphere": uniform on the unit sphere. "gaussian": N(0, I / d). "orthonormal": mutually orthogonal within a set, each
    uniform on the sphere; raises ValueError if q > d. The generator is on the CPU.
    """
    if sampling == "orthonormal" and directions > dimension:
        raise ValueError(f"{directions} orthonormal directions do not exist in {dimension} dimensions")
    drawn = torch.randn(count, directions, dimension, generator=generator)
    if sampling == "gaussian":
        return drawn.div_(dimension**0.5)
    if sampling == "sphere":
        return drawn.div_(drawn.norm(dim=2, keepdim=True))
    # Q of a Gaussian matrix spans a uniformly random subspace, but LAPACK's convention fixes the columns' signs; left
    # so, E[u] is not zero, and the curvature term of forward differences becomes a bias.
    orthonormal: Tensor = torch.linalg.qr(drawn.transpose(1, 2)).Q
    signs = 2.0 * torch.randint(2, (count, 1, directions), generator=generator) - 1
    return (orthonormal * signs).transpose(1, 2)


@dataclass(frozen=True)
class Isotropic:
    """Directions of the whole space, drawn as `sample_directions` does."""

    isotropic: ClassVar[bool] = True

    sampling: Sampling = "sphere"

    def dimension(self, whole: int) -> int:
        """All of them."""
        return whole

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        return sample_directions(len(z), count, z[0].numel(), self.sampling, generator).to(z.device)


@dataclass(frozen=True)
class Subspace:
    """Directions in the span of `rows` (r, d), orthonormal: what lies outside is never seen, inside costs r, not d."""

    isotropic: ClassVar[bool] = True

    rows: Tensor
    sampling: Sampling = "orthonormal"

    def dimension(self, whole: int) -> int:
        """The subspace's."""
        return len(self.rows)

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        inside = sample_directions(len(z), count, len(self.rows), self.sampling, generator)
        return inside.to(z.device) @ self.rows.to(z.device)


def low_frequencies(shape: tuple[int, int, int], side: int) -> Tensor:
    """The `side` lowest frequencies along each axis of (C, H, W) images, by the type-II discrete cosine transform.

    Returned are (C side^2, C H W) orthonormal rows, the lowest first; raises ValueError if there are not so many.
    """
    channels, height, width = shape
    if not 1 <= side <= min(height, width):
        raise ValueError(f"images of {height} x {width} have 1 to {min(height, width)} frequencies, not {side}")
    vertical, horizontal = _cosines(height, side), _cosines(width, side)
    plane = torch.einsum("ah,bw->abhw", vertical, horizontal).reshape(side * side, height * width)
    rows: Tensor = torch.kron(torch.eye(channels), plane)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    frequency = places.square().sum(1).repeat(channels)
    return rows[frequency.argsort(stable=True)]


def _cosines(length: int, count: int) -> Tensor:
    """The first `count` orthonormal rows of the type-II discrete cosine transform: (count, length)."""
    places = (torch.arange(length) + 0.5) * math.pi / length
    rows = torch.cos(torch.arange(count).unsqueeze(1) * places) * math.sqrt(2 / length)
    rows[0] /= math.sqrt(2)
    return rows


@dataclass(frozen=True)
class Guided:
    """The surrogate's own gradient as the first direction, then those of `others` made orthogonal to it.

    The slope along it says, for one query, how far the surrogate is to be trusted there, and with which sign.
    """

    isotropic: ClassVar[bool] = False

    others: Directions = field(default_factory=lambda: Isotropic("orthonormal"))

    def dimension(self, whole: int) -> int:
        """The whole space's."""
        return whole

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        first = _unit(loss.surrogate_gradient(z).flatten(1)).unsqueeze(1)
        if count == 1:
            return first
        others = self.others.draw(z, count - 1, loss, generator)
        others = others - (others @ first.transpose(1, 2)) * first
        return torch.cat([first, _unit(others)], dim=1)


def _unit(vectors: Tensor) -> Tensor:
    """(..., d) vectors divided by their norms; negligible ones become zero."""
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > _NEGLIGIBLE * norms.max(), vectors / norms.clamp_min(1e-30), 0.0)
