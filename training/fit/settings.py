"""What the loop of `zo_fit` needs to know."""

import math
from dataclasses import dataclass
from typing import Literal

from defense.victims import QueryLedger


@dataclass(frozen=True)
class FitSettings:
    """What the loop needs to know.

    Attributes:
        sigma: Standard deviation of the noise on the images, in units of the [0, 1] range.
        less_noise: Share of the training images that get any level below sigma.
        batch: Images a step about which the victim is asked.
        extra: Images a step about which only the surrogate is asked.
        learning_rate: Adam's.
        mse_weight: Weight of the mean squared error per pixel beside the stability loss.
        clip: Bound on the norm of all parameters' gradient together.
        schedule: Of the learning rate: constant, or a cosine down to zero as the budget (or the steps) run out.
        averaging: Decay of the exponential average of the weights, which is what is validated and served; 0: none.
        reconstruction: Whether the served sanitizer has the autoencoder, where it is trained with one: "chosen" tries
            both at every validation and keeps the better.
        steps: At most so many steps; None: until the budget is spent.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        seed: Of everything random.
    """

    sigma: float
    less_noise: float
    batch: int
    extra: int
    learning_rate: float
    mse_weight: float
    clip: float
    schedule: Literal["constant", "cosine"]
    averaging: float
    reconstruction: Literal["kept", "chosen"]
    steps: int | None
    validate_every: int
    checkpoint_every: int
    seed: int

    def learning_rate_at(self, step: int, ledger: QueryLedger) -> float:
        """The learning rate of the step after `step`, by how much of the steps, or else of the budget, is gone."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.steps is not None:
            gone = step / self.steps
        else:
            gone = 0.0 if ledger.max_queries is None else ledger.total / ledger.max_queries
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * min(1.0, gone)))
