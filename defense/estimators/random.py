"""RGE: the gradient from slopes along random directions."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from defense.estimators.base import Difference, Estimate, Loss, Points, affordable
from defense.estimators.directions import Directions, Isotropic

Combination = Literal["unbiased", "projection"]


@dataclass(frozen=True)
class RandomGradientEstimator:
    """RGE: the gradient from the slopes D_i along q directions u_i (Zhang et al. 2022, equation 4; Liu et al. 2020).

    Attributes:
        directions: q.
        mu: The step, in the L2 norm of z's space.
        where: Which directions.
        difference: Forward, D = (l(z + mu u) - l(z)) / mu: q + 1 evaluations a point. Central (antithetic),
            D = (l(z + mu u) - l(z - mu u)) / (2 mu): 2 q.
        combine: "unbiased": (r / q) sum_i D_i u_i, whose squared error is r / q times that of the gradient.
            "projection": the gradient's projection on the span of the directions, biased towards zero but never longer
            than the gradient; for orthonormal directions q / r times the other, the factor of least squared error.
    """

    directions: int
    mu: float
    where: Directions = field(default_factory=Isotropic)
    difference: Difference = "forward"
    combine: Combination = "unbiased"

    def __post_init__(self) -> None:
        """Refuses what would not be unbiased."""
        if self.combine == "unbiased" and not self.where.isotropic:
            raise ValueError(f"{type(self.where).__name__} directions are not isotropic: combine them by projection")

    def evaluations(self, dimension: int) -> int:
        """Evaluations for one point, whatever its dimension."""
        return self.directions + 1 if self.difference == "forward" else 2 * self.directions

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """See `Estimator`."""
        images, central = len(z), self.difference == "central"
        count = affordable(self.directions, *((0, 2) if central else (1, 1)), images, budget)
        directions = self.where.draw(z, count, loss, generator)
        center = z.detach().flatten(1).unsqueeze(1)
        other = center - self.mu * directions if central else center
        points = torch.cat([center + self.mu * directions, other], dim=1).unflatten(2, z.shape[1:])
        with torch.no_grad():
            values = loss.black_box(Points.around(points, center=0 if central else count)).view(images, -1)
        slopes = (values[:, :count] - values[:, count:]) / (2 * self.mu if central else self.mu)
        at_z = values.mean(1) if central else values[:, count]
        return Estimate(self._combined(slopes, directions).view_as(z), at_z, values.numel())

    def _combined(self, slopes: Tensor, directions: Tensor) -> Tensor:
        """(N, d) gradients from (N, q) slopes along (N, q, d) directions."""
        count, dimension = directions.shape[1:]
        if self.combine == "unbiased":
            return torch.einsum("nq,nqd->nd", slopes, directions) * (self.where.dimension(dimension) / count)
        gram = directions @ directions.transpose(1, 2)
        ridge = 1e-6 * torch.eye(count, device=gram.device)
        weights = torch.linalg.solve(gram + ridge, slopes.unsqueeze(2))
        gradient: Tensor = (weights * directions).sum(1)
        return gradient
