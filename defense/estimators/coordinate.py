"""CGE: the gradient from finite differences along every coordinate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import BudgetExhausted
from defense.estimators.base import Estimate, Loss
from defense.estimators.slopes import Difference


@dataclass(frozen=True)
class CoordinateGradientEstimator:
    """CGE: the finite difference along every coordinate (Zhang et al. 2022, equation 5).

    Exact on quadratics with central differences; its bias is (mu / 2) |diag H| with forward ones.

    Attributes:
        mu: The step.
        difference: Central, as the authors' code: 2 d evaluations a point; forward: d + 1.
        live_only: Leaves out the coordinates that are exactly zero in an image's z. Behind a ReLU those units are dead:
            no gradient passes through them, so an estimate there would be paid for and thrown away.
        noise: s, the standard deviation of the loss between equal evaluations, as the probe found it.
    """

    mu: float
    difference: Difference = "central"
    live_only: bool = False
    noise: float = 0.0

    def evaluations(self, dimension: int) -> int:
        """Evaluations for one point of `dimension` numbers, all of them live."""
        return dimension + 1 if self.difference == "forward" else 2 * dimension

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. Draws nothing from the generator.

        Its own error estimate is that of the noise, 2 d s^2 / mu^2 (central: d s^2 / (2 mu^2)); the bias it cannot see.
        Central differences tell no loss (NaN) of an image without a live coordinate: nothing was evaluated there.
        """
        flat = z.detach().flatten(1)
        images = len(flat)
        live = flat != 0 if self.live_only else torch.ones_like(flat, dtype=torch.bool)
        owner, axis = live.nonzero(as_tuple=True)
        measured = len(owner)
        spent = measured + images if self.difference == "forward" else 2 * measured
        if budget is not None and spent > budget:
            raise BudgetExhausted(f"every coordinate of {images} images takes {spent} evaluations, not {budget}")
        above = flat[owner]
        above[torch.arange(measured), axis] += self.mu
        if self.difference == "forward":
            points, owners, span = torch.cat([flat, above]), torch.cat([torch.arange(images).to(owner), owner]), self.mu
        else:
            below = flat[owner]
            below[torch.arange(measured), axis] -= self.mu
            points, owners, span = torch.cat([above, below]), torch.cat([owner, owner]), 2 * self.mu
        with torch.no_grad():
            values = loss.black_box(points.view(-1, *z.shape[1:]), owners)
        if self.difference == "forward":
            base, variance = values[:images], 2 * self.noise**2 / span**2
            slopes = (values[images:] - base[owner]) / span
        else:
            sums = torch.zeros(images, device=z.device).index_add(0, owners, values)
            base, variance = sums / (2 * live.sum(1)), 2 * self.noise**2 / span**2
            slopes = (values[:measured] - values[measured:]) / span
        gradient = torch.zeros_like(flat)
        gradient[owner, axis] = slopes
        return Estimate(gradient.view_as(z), base, live.sum(1) * variance, spent)
