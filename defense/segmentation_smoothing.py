"""Randomised smoothing of segmenters: a certificate for every pixel, and for all of them together.

Source: Fischer, Baader and Vechev, "Scalable Certified Segmentation via Randomized Smoothing", ICML 2021 (SegCertify,
algorithm 2): each pixel is a classifier of its own; a fixed threshold tau gives all of them one radius; Holm's
correction holds the probability that any of them is wrong below alpha.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.smoothing import ABSTAIN, BaseClassifier, certified_radius, sample_counts


@dataclass(frozen=True)
class MaskCertificate:
    """What is known about one image's mask.

    Attributes:
        labels: (H,W) int64: each pixel's smoothed class, or `ABSTAIN`.
        radius: L2 radius in units of [0,1] within which none of the classes in `labels` changes.
        samples: How many answers of the base classifier it rests on.
    """

    labels: Tensor
    radius: float
    samples: int


def mask_radius(tau: float, sigma: float) -> float:
    """Sigma * Phi^-1(tau), the radius of every pixel whose class has a probability above tau.

    Raises:
        ValueError: tau is not at least 1/2 and below 1.
    """
    if not 0.5 <= tau < 1:
        raise ValueError(f"tau must be at least 0.5 and below 1, got {tau}")
    return certified_radius(tau, sigma)


def certify_mask_counts(
    selection: Tensor, estimation: Tensor, *, sigma: float, tau: float, alpha: float
) -> MaskCertificate:
    """SegCertify on counts.

    Args:
        selection: (K,H,W) integer counts of the n0 samples that choose each pixel's class.
        estimation: (K,H,W) integer counts of n other samples.
        sigma: Standard deviation of the noise, in units of [0,1].
        tau: Least probability of a class that is not abstained from, in [0.5, 1).
        alpha: Probability that any of the pixels is wrong, in (0,1).
    """
    radius = mask_radius(tau, sigma)
    labels = selection.argmax(0)
    hits = estimation.gather(0, labels.unsqueeze(0)).squeeze(0).numpy()
    n = int(estimation.sum(0).flatten()[0])
    # H0: the class has a probability of at most tau. It is rejected where so many hits would be too unlikely.
    p_values = binom.sf(hits - 1, n, tau)
    certain = torch.from_numpy(holm(p_values.ravel(), alpha).reshape(hits.shape))
    samples = int(selection.sum(0).flatten()[0]) + n
    return MaskCertificate(torch.where(certain, labels, ABSTAIN), radius, samples)


def holm(p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Which of (M,) null hypotheses are rejected, the probability of any wrong rejection at most alpha (Holm 1979).

    Step-down: the k-th smallest p-value is compared with alpha / (M - k + 1), up to the first that is not below it.
    Holds whatever the dependence between the tests, as between the pixels of one image.

    Raises:
        ValueError: alpha does not lie between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= alpha / (len(p_values) - np.arange(len(p_values)))
    rejected = np.zeros(len(p_values), dtype=bool)
    rejected[order] = np.logical_and.accumulate(passed)
    return rejected


def certify_mask(
    classifier: BaseClassifier,
    image: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    tau: float,
    alpha: float,
    generator: torch.Generator,
    batch: int = 1024,
) -> MaskCertificate:
    """SegCertify of one image (C,H,W): n0 samples choose the classes, n more test them.

    With probability at least 1 - alpha over the noise, the smoothed segmenter answers the certificate's class at every
    pixel that it does not abstain from, everywhere within its radius. Arguments as in `defense.smoothing.sample_counts`
    and `certify_mask_counts`.

    Raises:
        InvalidAnswer: The classifier's answers are no (N,K,H,W) scores.
    """
    counts = [
        sample_counts(classifier, image, n=count, sigma=sigma, generator=generator, batch=batch) for count in (n0, n)
    ]
    if counts[0].ndim != 3 or counts[0].shape != counts[1].shape:
        raise InvalidAnswer("expected a class for every pixel, got one for every image")
    return certify_mask_counts(*counts, sigma=sigma, tau=tau, alpha=alpha)
