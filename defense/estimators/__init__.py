"""Zeroth-order estimators: the gradient of a black-box loss from its values alone (docs/theory.md).

Each evaluates all directions of all images in one call of the loss. Symbols: z a point of d numbers, l its loss, g its
gradient, q the number of directions u, D the slope along one, mu the step, r the dimensions of a subspace.
"""

from defense.estimators.base import Difference, Estimate, Estimator, Loss, Points
from defense.estimators.coordinate import CoordinateGradientEstimator
from defense.estimators.directions import (
    Directions,
    Guided,
    Isotropic,
    Sampling,
    Subspace,
    low_frequencies,
    sample_directions,
)
from defense.estimators.exact import ExactGradient
from defense.estimators.local import LocalGradientEstimator
from defense.estimators.random import Combination, RandomGradientEstimator
from defense.estimators.surrogate import Extrapolation, SurrogateGradient

__all__ = [
    "Combination",
    "CoordinateGradientEstimator",
    "Difference",
    "Directions",
    "Estimate",
    "Estimator",
    "ExactGradient",
    "Extrapolation",
    "Guided",
    "Isotropic",
    "LocalGradientEstimator",
    "Loss",
    "Points",
    "RandomGradientEstimator",
    "Sampling",
    "Subspace",
    "SurrogateGradient",
    "low_frequencies",
    "sample_directions",
]
