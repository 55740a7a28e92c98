"""Zeroth-order estimators: the gradient of a black-box loss from its values alone.

Every estimator takes the points and a loss, evaluates all directions of all points in one call of that loss, and
spends a number of evaluations that is known beforehand. Symbols: z a point of d numbers, l its loss, q the number of
directions u, mu the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""(N, P, *shape) points, P for each of N images, -> (N, P) losses."""

Difference = Literal["forward", "central"]
Sampling = Literal["sphere", "gaussian", "orthonormal"]


@dataclass(frozen=True)
class Estimate:
    """What an estimator found.

    Attributes:
        gradient: (N, *shape) estimate of each image's gradient.
        loss: (N,) the loss at each point; for central differences the mean over all evaluations.
    """

    gradient: Tensor
    loss: Tensor


class Estimator(Protocol):
    """The interface of all estimators."""

    def evaluations(self, dimension: int) -> int:
        """How many times the loss is evaluated for one point of `dimension` numbers."""
        ...

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator) -> Estimate:
        """Estimates the gradient at each of N points.

        Args:
            z: (N, *shape) points.
            loss: Called once with (N, P, *shape), where N x P is all that is evaluated.
            generator: Source of the random directions, on the CPU, so that a run is the same on every device.
        """
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


@dataclass(frozen=True)
class RandomGradientEstimator:
    """RGE: the mean of directional differences along q random directions.

    g = (d / q) sum_i D_i u_i with D_i = (l(z + mu u_i) - l(z)) / mu, or (l(z + mu u_i) - l(z - mu u_i)) / (2 mu) for
    central differences (Zhang et al. 2022, equation 4; Liu et al. 2020). Unbiased for the loss smoothed over the
    ball of radius mu when directions lie on the sphere.

    Attributes:
        directions: q.
        mu: The step, in the L2 norm of z's space.
        sampling: How the directions are drawn.
        difference: Forward: q + 1 evaluations a point; central: 2 q.
    """

    directions: int
    mu: float
    sampling: Sampling = "sphere"
    difference: Difference = "forward"

    def evaluations(self, dimension: int) -> int:
        """Evaluations for one point, whatever its dimension."""
        return self.directions + 1 if self.difference == "forward" else 2 * self.directions

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`."""
        flat = z.detach().flatten(1)
        count, dimension = flat.shape
        directions = sample_directions(count, self.directions, dimension, self.sampling, generator).to(z.device)
        slopes, base = _slopes(z, directions, self.mu, self.difference, loss)
        gradient = torch.einsum("nq,nqd->nd", slopes, directions) * (dimension / self.directions)
        return Estimate(gradient.view_as(z), base)


@dataclass(frozen=True)
class CoordinateGradientEstimator:
    """CGE: the finite difference along every coordinate (Zhang et al. 2022, equation 5).

    Exact on quadratics with central differences; its bias is (mu / 2) |diag H| with forward ones.

    Attributes:
        mu: The step.
        difference: Central, as the authors' code: 2 d evaluations a point; forward: d + 1.
    """

    mu: float
    difference: Difference = "central"

    def evaluations(self, dimension: int) -> int:
        """Evaluations for one point of `dimension` numbers."""
        return dimension + 1 if self.difference == "forward" else 2 * dimension

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. Draws nothing from the generator."""
        dimension = z[0].numel()
        axes = torch.eye(dimension, device=z.device).expand(len(z), -1, -1)
        slopes, base = _slopes(z, axes, self.mu, self.difference, loss)
        return Estimate(slopes.view_as(z), base)


def _slopes(z: Tensor, directions: Tensor, mu: float, difference: Difference, loss: Loss) -> tuple[Tensor, Tensor]:
    """The (N, q) slopes of the loss along (N, q, d) directions, and the (N,) loss."""
    centre = z.detach().flatten(1).unsqueeze(1)
    forward = centre + mu * directions
    if difference == "forward":
        values = loss(_shaped(torch.cat([centre, forward], dim=1), z))
        base = values[:, 0]
        return (values[:, 1:] - values[:, :1]) / mu, base
    values = loss(_shaped(torch.cat([forward, centre - mu * directions], dim=1), z))
    above, below = values.chunk(2, dim=1)
    return (above - below) / (2 * mu), values.mean(1)


def _shaped(points: Tensor, z: Tensor) -> Tensor:
    return points.view(len(z), -1, *z.shape[1:])
