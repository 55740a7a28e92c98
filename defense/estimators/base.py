"""What all estimators share: the loss they are given, what they return, and what they may spend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from defense.errors import BudgetExhausted

Difference = Literal["forward", "central"]


@dataclass(frozen=True)
class Points:
    """What is evaluated in one call of the black box: points around each of the first n of N images.

    Attributes:
        z: (M, *shape).
        owners: (M,) int64, which image each point belongs to.
        centers: (n,) int64, the point that stands for each image: its own; one beside it for central differences.
    """

    z: Tensor
    owners: Tensor
    centers: Tensor

    @classmethod
    def around(cls, points: Tensor, center: int) -> "Points":
        """P points of each image (n, P, *shape), the one at `center` standing for it."""
        images, each = points.shape[:2]
        index = torch.arange(images, device=points.device)
        return cls(points.flatten(0, 1), index.repeat_interleave(each), index * each + center)


@dataclass(frozen=True)
class Loss:
    """The loss at the border of the black box, for N images at once.

    Attributes:
        black_box: M points -> (M,) losses. Every point costs one victim query.
        surrogate: (n, *shape) points, of the first n images, -> (n,) losses of a differentiable model, without a query.
        located: M points -> (M, H, W) losses of pixels that sum to those of `black_box`, linearised around the centers;
            None where the black box does not answer for every pixel.
    """

    black_box: Callable[[Points], Tensor]
    surrogate: Callable[[Tensor], Tensor] | None = None
    located: Callable[[Points], Tensor] | None = None

    def surrogate_gradient(self, z: Tensor) -> Tensor:
        """(N, *shape) gradient of each image's surrogate loss at its point; raises ValueError without a surrogate."""
        if self.surrogate is None:
            raise ValueError("this estimator needs a surrogate of the black box, and the loss has none")
        with torch.enable_grad():
            points = z.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.surrogate(points).sum(), points)
        return gradient


@dataclass(frozen=True)
class Estimate:
    """What an estimator found.

    Attributes:
        gradient: (N, *shape) estimate of each image's gradient.
        loss: (N,) the loss at each point; for central differences the mean over all evaluations.
        spent: Evaluations of the black box, over all images.
    """

    gradient: Tensor
    loss: Tensor
    spent: int


class Estimator(Protocol):
    """The interface of all estimators."""

    def evaluations(self, dimension: int) -> int:
        """Evaluations of the black box for one point of `dimension` numbers, if the budget allows it."""
        ...

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """Estimates the gradient at each of N points z (N, *shape), any shape, by one call of the loss's black box.

        The generator, on the CPU, is the estimator's whole state. `budget` is the most evaluations over all images;
        None: as many as `evaluations` says.

        Raises:
            BudgetExhausted: The budget does not hold the least that this estimator needs; nothing was spent.
        """
        ...


def affordable(wanted: int, fixed: int, each: int, images: int, budget: int | None) -> int:
    """How many of the `wanted` directions of each image a budget of evaluations holds; None: unlimited.

    An image costs `fixed` evaluations, and `each` for every direction. Raises BudgetExhausted below one direction an
    image.
    """
    if budget is None:
        return wanted
    held = (budget // images - fixed) // each
    if held < 1:
        raise BudgetExhausted(
            f"a budget of {budget} evaluations holds no direction for each of {images} images: "
            f"at least {images * (fixed + each)} are needed"
        )
    return min(wanted, held)
