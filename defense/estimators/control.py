"""The surrogate as a control variate: what it already knows is not paid for again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import BudgetExhausted
from defense.estimators.base import Estimate, Loss
from defense.estimators.directions import unit
from defense.estimators.random import RandomGradientEstimator

_SIGNIFICANT = 2.0  # standard errors
_FEWEST = 5  # slopes that can be significant: their correlation times the root of their number has to exceed that


@dataclass(frozen=True)
class ControlVariate:
    """RGE of what the surrogate does not explain, plus what it does.

    g = beta h + RGE applied to the slopes D_i - beta h . u_i, with h the surrogate's gradient. If the inner estimator
    is unbiased, so is this, for any beta that does not depend on the image's own directions; its squared error is that
    of the inner one on g - beta h: at the best beta (1 - c^2) of it, c the cosine of g and h (docs/theory.md, formula
    6).

    Attributes:
        inner: Measures the slopes and makes a gradient of what is left of them.
    """

    inner: RandomGradientEstimator

    def evaluations(self, dimension: int) -> int:
        """As many as the inner estimator's."""
        return self.inner.evaluations(dimension)

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. The loss needs a surrogate."""
        known = loss.surrogate_gradient(z).flatten(1)
        slopes = self.inner.measure(z, loss, generator, budget)
        predicted = torch.einsum("nqd,nd->nq", slopes.directions, known)
        beta = leave_one_out(slopes.values, predicted)
        rest, error = self.inner.assemble(slopes.minus(beta.unsqueeze(1) * predicted))
        gradient = beta.unsqueeze(1) * known + rest
        return Estimate(gradient.view_as(z), slopes.loss, error, slopes.spent)


@dataclass(frozen=True)
class SurrogateGradient:
    """The surrogate's gradient itself, scaled by what slopes at a few images of the batch say of it.

    Most images cost the one evaluation at their point, from which the surrogate then learns. Biased by whatever the
    surrogate does not know; where the slopes do not confirm it, the estimate is zero, and the step is left to the other
    terms of the objective.

    Attributes:
        checked: Images of a batch, its first ones, at which the slope along the surrogate's gradient is measured; 0: it
            is believed as it is. Fewer than 5 could never confirm it.
        mu: The step of those measurements.
    """

    checked: int
    mu: float

    def __post_init__(self) -> None:
        """Refuses what would always be zero."""
        if 0 < self.checked < _FEWEST:
            raise ValueError(f"{self.checked} slopes cannot confirm a surrogate: check none, or at least {_FEWEST}")

    def evaluations(self, dimension: int) -> int:
        """At most so many for one point: two for those that are checked, one for the others."""
        return 2 if self.checked else 1

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. The loss needs a surrogate.

        Its own error estimate is that along the surrogate's gradient, the only direction it looks in: a lower bound.
        """
        images = len(z)
        known = loss.surrogate_gradient(z).flatten(1)
        checked = min(self.checked, images)
        if budget is not None and budget < images + checked:
            raise BudgetExhausted(
                f"a budget of {budget} evaluations does not hold {images} images, {checked} of them checked"
            )
        flat = z.detach().flatten(1)
        stepped = flat[:checked] + self.mu * unit(known[:checked])
        owners = torch.cat([torch.arange(images), torch.arange(checked)]).to(z.device)
        with torch.no_grad():
            values = loss.black_box(torch.cat([flat, stepped]).view(-1, *z.shape[1:]), owners)
        base = values[:images]
        beta, error = torch.ones((), device=z.device), torch.zeros((), device=z.device)
        if checked:
            slopes, predicted = (values[images:] - base[:checked]) / self.mu, known[:checked].norm(dim=1)
            beta = trusted_factor((slopes * predicted).sum(), predicted.square().sum(), slopes.square().sum(), checked)
            error = (slopes - beta * predicted).square().mean()
        return Estimate((beta * known).view_as(z), base, error.expand(images), images + checked)


def leave_one_out(measured: Tensor, predicted: Tensor) -> Tensor:
    """The factor on the surrogate for each image, from the slopes at all other images of the batch.

    Args:
        measured: (N, q) slopes D of the black box.
        predicted: (N, q) slopes b of the surrogate along the same directions.

    Returns:
        (N,) factors, see `trusted_factor`. For a single image, which has no others, 0.
    """
    sums = ((measured * predicted).sum(1), predicted.square().sum(1), measured.square().sum(1))
    product, square, energy = (part.sum() - part for part in sums)
    return trusted_factor(product, square, energy, measured.numel() - measured.shape[1])


def trusted_factor(product: Tensor, square: Tensor, energy: Tensor, pairs: int) -> Tensor:
    """Least squares beta = sum D b / sum b^2; 0 where the correlation is not positive by two standard errors.

    So a surrogate that knows nothing changes nothing.

    Args:
        product: sum D b over the pairs, any shape.
        square: sum b^2.
        energy: sum D^2.
        pairs: How many pairs.
    """
    trusted = product * pairs**0.5 > _SIGNIFICANT * (square * energy).sqrt()
    return torch.where(trusted, product / square.clamp_min(1e-30), 0.0)
