"""The surrogate as a control variate: what it already knows is not paid for again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import BudgetExhausted
from defense.estimators.base import Estimate, Estimator, Loss
from defense.estimators.directions import unit
from defense.estimators.random import RandomGradientEstimator

_SIGNIFICANT = 2.0  # standard errors
FEWEST_TERMS = 5  # terms that can be significant: n of one size reach n / sqrt(n) standard errors


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

    Most images cost the one evaluation at their point, from which the surrogate then learns, or none. Biased by
    whatever the surrogate does not know; where the slopes do not confirm it, the estimate is zero, and the step is left
    to the other terms of the objective.

    Attributes:
        checked: Images of a batch, its first ones, at which the slope along the surrogate's gradient is measured; 0: it
            is believed as it is. Fewer than 5 could never confirm it.
        mu: The step of those measurements.
        asked: Images of a batch, its first ones, about which the black box is asked; the others cost nothing. None:
            all.
    """

    checked: int
    mu: float
    asked: int | None = None

    def __post_init__(self) -> None:
        """Refuses what would always be zero."""
        if 0 < self.checked < FEWEST_TERMS:
            raise ValueError(
                f"{self.checked} slopes cannot confirm a surrogate: check none, or at least {FEWEST_TERMS}"
            )
        if self.asked is not None and self.asked < max(1, self.checked):
            raise ValueError(f"{self.checked} of {self.asked} images cannot be checked: ask about more, or check fewer")

    def evaluations(self, dimension: int) -> int:
        """At most so many for one point: two for those that are checked, one for the others that are asked about."""
        return 2 if self.checked else 1

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. The loss needs a surrogate.

        The loss of an image that is not asked about is NaN. Its own error estimate is that along the surrogate's
        gradient, the only direction it looks in: a lower bound; NaN where nothing is checked.
        """
        images = len(z)
        known = loss.surrogate_gradient(z).flatten(1)
        asked = images if self.asked is None else min(self.asked, images)
        checked = min(self.checked, asked)
        if budget is not None and budget < asked + checked:
            raise BudgetExhausted(
                f"a budget of {budget} evaluations does not hold {asked} images, {checked} of them checked"
            )
        flat = z.detach().flatten(1)
        stepped = flat[:checked] + self.mu * unit(known[:checked])
        owners = torch.cat([torch.arange(asked), torch.arange(checked)]).to(z.device)
        with torch.no_grad():
            values = loss.black_box(torch.cat([flat[:asked], stepped]).view(-1, *z.shape[1:]), owners)
        base = values.new_full((images,), torch.nan)
        base[:asked] = values[:asked]
        beta, error = torch.ones((), device=z.device), torch.full((), torch.nan, device=z.device)
        if checked:
            slopes, predicted = (values[asked:] - values[:checked]) / self.mu, known[:checked].norm(dim=1)
            products = slopes * predicted
            beta = trusted_factor(products.sum(), predicted.square().sum(), products.square().sum())
            error = (slopes - beta * predicted).square().mean()
        return Estimate((beta * known).view_as(z), base, error.expand(images), asked + checked)


@dataclass(frozen=True)
class Extrapolation:
    """Measures some images of a batch, and takes the surrogate's word for the others, at the rate of the measured ones.

    The gradient of the parameters is an average over images, and which images are in a batch is most of its noise
    (docs/theory.md, formula 9). The surrogate's gradient costs no query, so a batch may hold many more images than are
    paid for: g = beta h at those, beta by least squares of the measured gradients on the surrogate's, zero where these
    do not confirm it.

    Attributes:
        inner: For the measured images, the first ones of a batch.
        measured: How many they are.
    """

    inner: Estimator
    measured: int

    def evaluations(self, dimension: int) -> int:
        """As many as the inner estimator's, for a measured point; none for the others."""
        return self.inner.evaluations(dimension)

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient of each image's loss; see `Estimator`. The loss needs a surrogate.

        The loss of an image that is not measured is NaN. Its error is taken to be what the rate leaves open on average
        at the measured ones.
        """
        few = min(self.measured, len(z))
        known = loss.surrogate_gradient(z).flatten(1)
        found = self.inner(z[:few], loss, generator, budget)
        measured, there = found.gradient.flatten(1), known[:few]
        products, squares = (measured * there).sum(1), there.square().sum(1)
        beta = trusted_factor(products.sum(), squares.sum(), products.square().sum())
        left = (measured - beta * there).square().sum(1) + found.error
        others = len(z) - few
        return Estimate(
            torch.cat([measured, beta * known[few:]]).view_as(z),
            torch.cat([found.loss, found.loss.new_full((others,), torch.nan)]),
            torch.cat([found.error, left.mean().expand(others)]),
            found.spent,
        )


def leave_one_out(measured: Tensor, predicted: Tensor) -> Tensor:
    """The factor on the surrogate for each image, from the slopes at all other images of the batch.

    Args:
        measured: (N, q) slopes D of the black box.
        predicted: (N, q) slopes b of the surrogate along the same directions.

    Returns:
        (N,) factors, see `trusted_factor`. For a single image, which has no others, 0.
    """
    products = (measured * predicted).sum(1)
    sums = (products, predicted.square().sum(1), products.square())
    product, square, spread = (part.sum() - part for part in sums)
    return trusted_factor(product, square, spread)


def trusted_factor(product: Tensor, square: Tensor, spread: Tensor) -> Tensor:
    """Least squares beta = sum D b / sum b^2; 0 where the products D b are not positive by two standard errors.

    So a surrogate that knows nothing changes nothing. The standard error is that of a sum of independent terms of mean
    zero and whatever size, the root of their summed squares: slopes at different images differ by orders of magnitude.
    It takes more than four terms of one size to be significant.

    Args:
        product: sum D b over independent terms, any shape.
        square: sum b^2.
        spread: Sum of the squares of the terms of `product`.
    """
    trusted = product > _SIGNIFICANT * spread.clamp_min(0.0).sqrt()
    return torch.where(trusted, product / square.clamp_min(1e-30), 0.0)
