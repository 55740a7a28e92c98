"""Local credit: a black box that answers for every pixel tells where each part of a perturbation acted."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from defense.estimators.base import Estimate, Loss, Points, affordable


@dataclass(frozen=True)
class LocalGradientEstimator:
    """Random directions, each coordinate judged by the losses around it only (docs/theory.md, formula 10).

    All coordinates of z (N, c, h, w) step at once, `mu` in L2 norm, by random signs; what happens to the loss in a
    window around a cell (`window` cells a side, odd) is put down to that cell's c numbers. The error grows with the
    window's area and not with the dimension; what a cell does outside its window is not seen. `count` is q, the
    directions an image.
    """

    count: int
    mu: float
    window: int

    def __post_init__(self) -> None:
        """Refuses a window that has no middle."""
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"a window has an odd number of cells a side, not {self.window}")

    def evaluations(self, dimension: int) -> int:
        """One at the point, one a direction."""
        return 1 + self.count

    def __call__(self, z: Tensor, loss: Loss, generator: torch.Generator, budget: int | None = None) -> Estimate:
        """See `Estimator`. The loss needs to be `located`.

        Raises:
            ValueError: The loss is not located, or z has no cells that divide the image.
            BudgetExhausted: See `Estimator`.
        """
        if loss.located is None:
            raise ValueError("local credit needs a black box that answers for every pixel, and this one does not")
        if z.ndim != 4:
            raise ValueError(f"local credit needs points (N, c, h, w), and these have shape {tuple(z.shape)}")
        images, dimension = len(z), z[0].numel()
        count = affordable(self.count, 1, 1, images, budget)
        signs = 2.0 * torch.randint(2, (images, count, *z.shape[1:]), generator=generator).to(z) - 1
        directions = signs / dimension**0.5
        center = z.detach().unsqueeze(1)
        points = torch.cat([center, center + self.mu * directions], dim=1)
        with torch.no_grad():
            losses = loss.located(Points.around(points, center=0)).unflatten(0, (images, 1 + count))
        cells = _summed(losses.flatten(0, 1), z.shape[2], z.shape[3]).unflatten(0, (images, 1 + count))
        changes = cells[:, 1:] - cells[:, :1]
        around = F.avg_pool2d(changes, self.window, stride=1, padding=self.window // 2) * self.window**2
        gradient = (dimension * directions * (around / self.mu).unsqueeze(2)).mean(1)
        return Estimate(gradient, losses[:, 0].flatten(1).sum(1), images * (1 + count))


def _summed(losses: Tensor, height: int, width: int) -> Tensor:
    """(M, H, W) losses of pixels to (M, height, width) of cells."""
    rows, columns = losses.shape[1] // height, losses.shape[2] // width
    if (rows * height, columns * width) != tuple(losses.shape[1:]):
        raise ValueError(f"{height} x {width} cells do not divide images of {losses.shape[1]} x {losses.shape[2]}")
    return F.avg_pool2d(losses.unsqueeze(1), (rows, columns)).squeeze(1) * (rows * columns)
