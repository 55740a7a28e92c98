"""Scores of a victim that has none: the shares of its labels among noisy copies of an image."""

import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.victims import Victim


class VotingVictim:
    """Asks V noisy copies of each image for their labels, and answers the labels' shares (randomised smoothing).

    The expected share of a label under noise is a smooth function of the image (Cohen et al. 2019; Salman et al. 2019).
    The share of n of V votes is (n + 1/2) / (V + K/2), the Bayes estimate under Jeffreys' prior, whose logarithm is
    finite. Each image costs V queries: `MeteredVictim` has to be told. Every call has fresh noise of standard deviation
    `noise`, in units of [0,1], drawn on the CPU; copies are clipped to [0,1].
    """

    def __init__(self, victim: Victim, votes: int, noise: float, seed: int) -> None:
        if votes < 1 or noise < 0:
            raise ValueError(f"votes must be at least 1 and their noise not negative, got {votes} and {noise}")
        self.queries_per_image = votes
        self._victim = victim
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, K) or (N, K, H, W) float32 shares, summing to 1 over K, for (N, C, H, W) images in [0, 1].

        Raises InvalidAnswer if the victim's answer is no array of scores.
        """
        counts = None
        for _ in range(self.queries_per_image):  # one after the other: all copies at once need V times the memory
            noise = torch.randn(images.shape, generator=self._generator).to(images)
            scores = self._victim((images + self._noise * noise).clamp(0, 1))
            if scores.ndim < 2 or len(scores) != len(images) or (counts is not None and counts.shape != scores.shape):
                raise InvalidAnswer(
                    f"the victim answered scores of shape {tuple(scores.shape)} for {len(images)} images"
                )
            if not torch.isfinite(scores).all():
                raise InvalidAnswer("the victim answered scores that are not finite (NaN or infinity)")
            chosen = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).movedim(-1, 1).float()
            counts = chosen if counts is None else counts + chosen
        assert counts is not None  # there is at least one vote
        return (counts + 0.5) / (self.queries_per_image + counts.shape[1] / 2)
