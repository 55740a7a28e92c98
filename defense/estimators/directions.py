"""Where an estimator looks: directions of the whole space, of a subspace of it, or along the surrogate's gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from defense.estimators.base import Loss

Sampling = Literal["sphere", "gaussian", "orthonormal"]

Basis = Callable[[Tensor, Loss], Tensor]
"""(N, *shape) points and their loss -> (r, d) orthonormal rows for all of them, or (N, r, d) for each its own."""

_NEGLIGIBLE = 1e-6


class Directions(Protocol):
    """A way to choose directions.

    Attributes:
        sampling: How they are drawn, if isotropically in what is searched, E[u u^T] = P / r with P the projector on it;
            None where they are not, so that their slopes can only be combined by projection.
    """

    @property
    def sampling(self) -> Sampling | None:
        """See above."""
        ...

    def dimension(self, whole: int) -> int:
        """r, the dimensions of what is searched, in a space of `whole` dimensions."""
        ...

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """(N, *shape) points -> (N, count, d) unit directions (Gaussian ones: unit in the mean)."""
        ...

    def energy(self, slopes: Tensor, whole: int) -> Tensor:
        """(N,) squared norms of the gradient in what is searched, as (N, q) slopes along such directions tell them."""
        ...


def sample_directions(
    count: int, directions: int, dimension: int, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Draws random directions u scaled so that E[u u^T] = I / d.

    Args:
        count: N, independent sets.
        directions: q, in each set.
        dimension: d.
        sampling: "sphere": independent, uniform on the unit sphere. "gaussian": independent, N(0, I / d), of unit
            length only in the mean. "orthonormal": unit vectors, mutually orthogonal within a set, each uniform.
        generator: On the CPU.

    Returns:
        (N, q, d) float32.

    Raises:
        ValueError: More orthonormal directions than dimensions.
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


def relative_variance(count: int, rank: int, sampling: Sampling) -> float:
    """Squared error of the unbiased estimate on a linear loss, relative to |g|^2 (docs/theory.md, formulae 2 and 3).

    Args:
        count: q directions.
        rank: r, the dimensions that they are drawn from.
        sampling: (r - 1) / q for "sphere", (r + 1) / q for "gaussian", r / q - 1 for "orthonormal".
    """
    match sampling:
        case "sphere":
            return (rank - 1) / count
        case "gaussian":
            return (rank + 1) / count
        case "orthonormal":
            return rank / count - 1


@dataclass(frozen=True)
class Isotropic:
    """Directions of the whole space.

    Attributes:
        sampling: See `sample_directions`.
    """

    sampling: Sampling = "sphere"

    def dimension(self, whole: int) -> int:
        """All of them."""
        return whole

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        return sample_directions(len(z), count, z[0].numel(), self.sampling, generator).to(z.device)

    def energy(self, slopes: Tensor, whole: int) -> Tensor:
        """See `Directions`: as E[D^2] = |P g|^2 / r."""
        return self.dimension(whole) * slopes.square().mean(1)


@dataclass(frozen=True)
class Subspace:
    """Directions of a subspace: what lies outside it is never seen, what lies inside costs r dimensions, not d.

    Attributes:
        basis: Its orthonormal basis, from the points; may change from step to step.
        rank: r.
        sampling: See `sample_directions`; r dimensions instead of d.
        rotated: Share of the r dimensions that are random directions of the whole space, drawn anew for each step and
            shared by its images, in place of the last ones of the basis; so that over many steps nothing stays unseen.
    """

    basis: Basis
    rank: int
    sampling: Sampling = "orthonormal"
    rotated: float = 0.0

    def dimension(self, whole: int) -> int:
        """The subspace's."""
        return self.rank

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`."""
        basis = self.basis(z, loss)
        fresh = round(self.rotated * self.rank)
        if fresh:
            random = torch.randn(fresh, z[0].numel(), generator=generator).to(z.device)
            kept = basis[..., : self.rank - fresh, :]
            whole = torch.cat([kept, random.expand(*kept.shape[:-2], -1, -1)], dim=-2)
            basis = torch.linalg.qr(whole.transpose(-1, -2)).Q.transpose(-1, -2)
        inside = sample_directions(len(z), count, self.rank, self.sampling, generator).to(z.device)
        return inside @ basis

    def energy(self, slopes: Tensor, whole: int) -> Tensor:
        """See `Directions`: as E[D^2] = |P g|^2 / r."""
        return self.dimension(whole) * slopes.square().mean(1)


@dataclass(frozen=True)
class Guided:
    """The surrogate's own gradient as the first direction, and others made orthogonal to it after it.

    The slope along it says, for one query an image, how far the surrogate is to be trusted there, and with which sign.

    Attributes:
        others: Where the directions after the first come from.
        sampling: None: these are not isotropic.
    """

    others: Directions = field(default_factory=lambda: Isotropic("orthonormal"))
    sampling: None = None

    def dimension(self, whole: int) -> int:
        """The whole space's."""
        return whole

    def draw(self, z: Tensor, count: int, loss: Loss, generator: torch.Generator) -> Tensor:
        """See `Directions`; the first along the surrogate's gradient, the others orthogonal to it."""
        first = unit(loss.surrogate_gradient(z).flatten(1)).unsqueeze(1)
        if count == 1:
            return first
        others = self.others.draw(z, count - 1, loss, generator)
        others = others - (others @ first.transpose(1, 2)) * first
        return torch.cat([first, unit(others)], dim=1)

    def energy(self, slopes: Tensor, whole: int) -> Tensor:
        """See `Directions`: the first slope's share is what it is, the others speak for what is orthogonal to it."""
        first, others = slopes[:, 0].square(), slopes[:, 1:]
        return first + (1 - 1 / whole) * self.others.energy(others, whole) if others.shape[1] else first


def unit(vectors: Tensor) -> Tensor:
    """(..., d) vectors divided by their norms; those without one stay zero."""
    if not vectors.numel():
        return vectors
    norms = vectors.norm(dim=-1, keepdim=True)
    return torch.where(norms > _NEGLIGIBLE * norms.max(), vectors / norms.clamp_min(1e-30), 0.0)
