"""Slopes of the black box's loss along directions, from finite differences."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from defense.estimators.base import Loss

Difference = Literal["forward", "central"]


@dataclass(frozen=True)
class Slopes:
    """What was measured.

    Attributes:
        directions: (N, q, d), one along which each slope was taken.
        values: (N, q) slopes.
        loss: (N,) the loss at each point; for central differences the mean over all evaluations.
        spent: Evaluations of the black box, over all images.
    """

    directions: Tensor
    values: Tensor
    loss: Tensor
    spent: int

    def minus(self, known: Tensor) -> "Slopes":
        """What is left after (N, q) slopes that were known already."""
        return replace(self, values=self.values - known)


def measure_slopes(z: Tensor, directions: Tensor, mu: float, difference: Difference, loss: Loss) -> Slopes:
    """Measures the slopes at (N, *shape) points along (N, q, d) directions, in one call of the black box."""
    count = directions.shape[1]
    centre = z.detach().flatten(1).unsqueeze(1)
    forward = centre + mu * directions
    other = centre if difference == "forward" else centre - mu * directions
    values = evaluate(loss, z, torch.cat([forward, other], dim=1))
    above, below = values[:, :count], values[:, count:]
    if difference == "forward":
        return Slopes(directions, (above - below) / mu, below[:, 0], values.numel())
    return Slopes(directions, (above - below) / (2 * mu), values.mean(1), values.numel())


def evaluate(loss: Loss, z: Tensor, points: Tensor) -> Tensor:
    """The (N, P) losses at (N, P, d) points around the (N, *shape) points z."""
    images, count = points.shape[:2]
    owners = torch.arange(images, device=z.device).repeat_interleave(count)
    with torch.no_grad():
        values = loss.black_box(points.reshape(images * count, *z.shape[1:]), owners)
    return values.view(images, count)
