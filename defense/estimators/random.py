"""RGE: the gradient from slopes along random directions."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from defense.estimators.base import Estimate, Loss, affordable
from defense.estimators.directions import Directions, Isotropic, relative_variance
from defense.estimators.slopes import Difference, Slopes, measure_slopes

Combination = Literal["unbiased", "projection"]


@dataclass(frozen=True)
class RandomGradientEstimator:
    """RGE: the gradient from the slopes D_i along q directions u_i (Zhang et al. 2022, equation 4; Liu et al. 2020).

    Attributes:
        directions: q.
        mu: The step, in the L2 norm of z's space.
        where: Which directions.
        difference: Forward, D = (l(z + mu u) - l(z)) / mu: q + 1 evaluations a point. Central,
            D = (l(z + mu u) - l(z - mu u)) / (2 mu), also called antithetic: 2 q.
        combine: "unbiased": (r / q) sum_i D_i u_i, which is right in the mean, and whose error is r / q times as large
            as the gradient. "projection": the shortest vector with these slopes, which is the gradient's projection on
            the span of the directions; biased towards zero, but never longer than the gradient. For orthonormal
            directions it is q / r times the other, the factor of least squared error.
    """

    directions: int
    mu: float
    where: Directions = field(default_factory=Isotropic)
    difference: Difference = "forward"
    combine: Combination = "unbiased"

    def __post_init__(self) -> None:
        """Refuses what would not be unbiased."""
        if self.combine == "unbiased" and self.where.sampling is None:
            raise ValueError(f"{type(self.where).__name__} directions are not isotropic: combine them by projection")

    def evaluations(self, dimension: int) -> int:
        """Evaluations for one point, whatever its dimension."""
        return self.directions + 1 if self.difference == "forward" else 2 * self.directions

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`.

        Its own error estimate cannot see the bias of forward differences, nor what lies outside a subspace; of the
        noise, orthonormal directions show only the share 1 - q / r; along the surrogate's gradient alone it is zero.
        """
        slopes = self.measure(z, loss, generator, budget)
        gradient, error = self.assemble(slopes)
        return Estimate(gradient.view_as(z), slopes.loss, error, slopes.spent)

    def measure(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Slopes:
        """Draws the directions, as many as the budget holds, and measures the slopes along them."""
        fixed, each = (1, 1) if self.difference == "forward" else (0, 2)
        count = affordable(self.directions, fixed, each, len(z), budget)
        return measure_slopes(z, self.where.draw(z, count, loss, generator), self.mu, self.difference, loss)

    def assemble(self, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """(N, d) estimates from slopes, and the (N,) estimates of their squared errors."""
        count = slopes.values.shape[1]
        rank = self.where.dimension(slopes.directions.shape[2])
        energy = self.where.energy(slopes.values, slopes.directions.shape[2])
        if self.combine == "unbiased":
            gradient = torch.einsum("nq,nqd->nd", slopes.values, slopes.directions) * (rank / count)
            assert self.where.sampling is not None  # or it would have been refused
            return gradient, energy * relative_variance(count, rank, self.where.sampling)
        gram = slopes.directions @ slopes.directions.transpose(1, 2)
        ridge = 1e-6 * torch.eye(count, device=gram.device)
        weights = torch.linalg.solve(gram + ridge, slopes.values.unsqueeze(2))
        gradient = (weights * slopes.directions).sum(1)
        return gradient, (energy - gradient.square().sum(1)).clamp_min(0.0)
