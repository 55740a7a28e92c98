"""Zeroth-order estimators: the gradient of a black-box loss from its values alone.

Every estimator takes the points and a loss, evaluates all directions of all images in one call of that loss, and says
what it found, how far off it may be, and what it spent. They are put together from parts: where to look
(`Directions`), which differences to take, how to combine the slopes, and what a surrogate knew before.

Symbols: z a point of d numbers, l its loss, g its gradient, q the number of directions u, D the slope along one, mu the
step, r the dimensions of a subspace. The theory is in docs/theory.md.
"""

from defense.estimators.base import Estimate, Estimator, Loss
from defense.estimators.control import FEWEST_TERMS, ControlVariate, Extrapolation, SurrogateGradient
from defense.estimators.coordinate import CoordinateGradientEstimator
from defense.estimators.directions import Basis, Directions, Guided, Isotropic, Sampling, Subspace, sample_directions
from defense.estimators.exact import ExactGradient
from defense.estimators.local import LocalGradientEstimator
from defense.estimators.random import Combination, RandomGradientEstimator
from defense.estimators.slopes import Difference
from defense.estimators.subspaces import DecoderTangents, FixedSpan, SurrogateSpan, low_frequencies

__all__ = [
    "FEWEST_TERMS",
    "Basis",
    "Combination",
    "ControlVariate",
    "CoordinateGradientEstimator",
    "DecoderTangents",
    "Difference",
    "Directions",
    "Estimate",
    "Estimator",
    "ExactGradient",
    "Extrapolation",
    "FixedSpan",
    "Guided",
    "Isotropic",
    "LocalGradientEstimator",
    "Loss",
    "RandomGradientEstimator",
    "Sampling",
    "Subspace",
    "SurrogateGradient",
    "SurrogateSpan",
    "low_frequencies",
    "sample_directions",
]
