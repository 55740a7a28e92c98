"""The exact gradient, for white boxes: the upper bound that no black-box method can know."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import DefenseError
from defense.estimators.base import Estimate, Loss, Points


@dataclass(frozen=True)
class ExactGradient:
    """First-order training (FO-DS, FO-AE-DS; Salman et al. 2020) by autograd: one evaluation an image."""

    def evaluations(self, dimension: int) -> int:
        """One."""
        return 1

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """See `Estimator`; raises DefenseError if the victim is a black box."""
        with torch.enable_grad():
            points = z.detach().requires_grad_(True)
            values = loss.black_box(Points.around(points.unsqueeze(1), center=0))
            if not values.requires_grad:
                raise DefenseError("the exact gradient needs an open model in process; this victim is a black box")
            (gradient,) = torch.autograd.grad(values.sum(), points)
        return Estimate(gradient, values.detach(), len(z))
