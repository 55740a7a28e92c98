"""The surrogate's own gradient, followed as it is or at the rate that measured gradients allow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import BudgetExhausted
from defense.estimators.base import Estimate, Estimator, Loss, Points

_SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True)
class SurrogateGradient:
    """The surrogate's gradient itself, biased by whatever the surrogate does not know.

    For it to learn, the black box is asked about the first `asked` images of a batch (None: all); the others cost
    nothing.
    """

    asked: int | None = None

    def evaluations(self, dimension: int) -> int:
        """One for each point that is asked about."""
        return 1

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """See `Estimator`. The loss needs a surrogate; that of an image not asked about is NaN."""
        images = len(z)
        known = loss.surrogate_gradient(z)
        asked = images if self.asked is None else min(self.asked, images)
        if budget is not None and budget < asked:
            raise BudgetExhausted(f"a budget of {budget} evaluations does not hold {asked} images")
        with torch.no_grad():
            values = loss.black_box(Points.around(z.detach()[:asked].unsqueeze(1), center=0))
        at_z = values.new_full((images,), torch.nan)
        at_z[:asked] = values
        return Estimate(known, at_z, asked)


@dataclass(frozen=True)
class Extrapolation:
    """Measures the first `measured` images of a batch by `inner`; follows the surrogate at the others, at their rate.

    Which images are in a batch is most of the noise of the parameters' gradient (docs/theory.md, formula 9), and the
    surrogate's gradient h costs no query: g = beta h at images that are not measured, see `trusted_factor`.
    """

    inner: Estimator
    measured: int

    def evaluations(self, dimension: int) -> int:
        """The inner estimator's, for a measured point; none for the others."""
        return self.inner.evaluations(dimension)

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """See `Estimator`. The loss needs a surrogate; that of an image not measured is NaN."""
        few = min(self.measured, len(z))
        known = loss.surrogate_gradient(z)
        found = self.inner(z[:few], loss, generator, budget)
        beta = trusted_factor(found.gradient.flatten(1), known[:few].flatten(1))
        return Estimate(
            torch.cat([found.gradient, beta * known[few:]]),
            torch.cat([found.loss, found.loss.new_full((len(z) - few,), torch.nan)]),
            found.spent,
        )


def trusted_factor(measured: Tensor, known: Tensor) -> Tensor:
    """Least squares beta = sum g.h / sum |h|^2 of (..., N, d) measured vectors g on known ones h.

    0 where the products g.h are not positive by two standard errors: a surrogate that knows nothing changes nothing
    (docs/theory.md, formula 6).
    """
    products = (measured * known).sum(-1)
    total = products.sum(-1)
    trusted = total > _SIGNIFICANT * products.square().sum(-1).sqrt()
    return torch.where(trusted, total / known.square().sum((-2, -1)).clamp_min(1e-30), 0.0)
