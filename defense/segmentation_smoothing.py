"""Randomised smoothing of segmenters: a certificate for every pixel, and for all of them together.

SegCertify (Fischer, Baader and Vechev, ICML 2021, algorithm 2): each pixel is a classifier of its own; a fixed
threshold tau gives all one radius; Holm's correction holds the probability that any of them is wrong below alpha.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.smoothing import ABSTAIN, BaseClassifier, certified_radius, check_alpha, sample_counts

TAU = 0.75
"""The paper's threshold: a class has to have at least this probability under noise to be certified."""


@dataclass(frozen=True)
class MaskCertificate:
    """What is known about one image's mask.

    Attributes:
        labels: (H,W) int64: each pixel's smoothed class, or `ABSTAIN`.
        radius: L2 radius in units of [0,1] within which none of the classes in `labels` changes.
        samples: Answers of the base classifier it rests on.
    """

    labels: Tensor
    radius: float
    samples: int

    @property
    def abstained(self) -> float:
        """Share of the pixels without an answer at this confidence, in [0,1]."""
        return (self.labels == ABSTAIN).float().mean().item()


def mask_radius(tau: float, sigma: float) -> float:
    """Sigma * Phi^-1(tau), the radius of every certified pixel; raises ValueError unless tau is in [0.5, 1)."""
    if not 0.5 <= tau < 1:
        raise ValueError(f"tau must be at least 0.5 and below 1, got {tau}")
    return certified_radius(tau, sigma)


def certify_mask_counts(
    selection: Tensor, estimation: Tensor, *, sigma: float, alpha: float, tau: float = TAU
) -> MaskCertificate:
    """SegCertify on (K,H,W) counts, K >= 2: n0 samples' choose each pixel's class, n others' test it.

    `sigma` is the noise's, in units of [0,1]; `alpha`, in (0,1), the probability that any of the pixels is wrong;
    `tau`, in [0.5, 1), the least probability of a class that is not abstained from.

    Raises:
        ValueError: tau or alpha is out of its range, or the counts are not those of the same samples at every pixel.
    """
    radius = mask_radius(tau, sigma)
    if selection.shape != estimation.shape:
        raise ValueError(f"counts of two shapes: {tuple(selection.shape)} and {tuple(estimation.shape)}")
    n0, n = _samples(selection), _samples(estimation)
    labels = selection.argmax(0)
    hits = estimation.gather(0, labels.unsqueeze(0)).squeeze(0).cpu().numpy()
    # H0: the class has a probability of at most tau. It is rejected where so many hits would be too unlikely.
    from scipy.stats import binom

    p_values = binom.sf(hits - 1, n, tau)
    certain = torch.from_numpy(holm(p_values.ravel(), alpha).reshape(hits.shape))
    return MaskCertificate(torch.where(certain, labels.cpu(), ABSTAIN), radius, n0 + n)


def predict_mask_counts(counts: Tensor, *, alpha: float) -> Tensor:
    """Each pixel's most frequent class, (H,W), or `ABSTAIN` where its lead may be chance: no certificate.

    `Predict` of Cohen et al. 2019 at each of M pixels of (K,H,W) counts, at alpha / M (Bonferroni): Holm's correction
    does not hold here, as the samples that test a class have chosen it too. `alpha`, in (0,1), is the probability that
    any answer is not the smoothed segmenter's. Raises ValueError as `certify_mask_counts` does.
    """
    check_alpha(alpha)
    _samples(counts)
    lead = torch.topk(counts.cpu(), 2, dim=0)
    first, second = lead.values.numpy()
    from scipy.stats import binom

    p_values = 2 * binom.sf(first - 1, first + second, 0.5)  # two-sided, as either class could have led
    certain = torch.from_numpy(p_values <= alpha / p_values.size)
    return torch.where(certain, lead.indices[0], ABSTAIN)


def holm(p_values: np.ndarray, alpha: float) -> np.ndarray:
    """Which of (M,) null hypotheses are rejected, any wrongly with probability at most alpha in (0,1) (Holm 1979).

    Holds whatever the dependence between the tests.
    """
    check_alpha(alpha)
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
    alpha: float,
    generator: torch.Generator,
    tau: float = TAU,
    batch: int = 1024,
) -> MaskCertificate:
    """SegCertify of one image (C,H,W): n0 samples choose the classes, n more test them.

    With probability at least 1 - alpha over the noise, the smoothed segmenter answers the certificate's class at every
    pixel not abstained from, everywhere within its radius. Arguments as in `sample_counts` and `certify_mask_counts`.

    Raises:
        InvalidAnswer: The classifier's answers are no (N,K,H,W) scores.
        ValueError: tau or alpha is out of its range; nothing was sampled.
    """
    mask_radius(tau, sigma)
    check_alpha(alpha)
    selection = _of_pixels(sample_counts(classifier, image, n=n0, sigma=sigma, generator=generator, batch=batch))
    estimation = sample_counts(classifier, image, n=n, sigma=sigma, generator=generator, batch=batch)
    if selection.shape != estimation.shape:
        raise InvalidAnswer("the classifier changed the shape of its answers between two batches")
    return certify_mask_counts(selection, estimation, sigma=sigma, tau=tau, alpha=alpha)


def _of_pixels(counts: Tensor) -> Tensor:
    """The (K,H,W) counts of one image, or `InvalidAnswer` where they are (K,)."""
    if counts.ndim != 3:
        raise InvalidAnswer("expected a class for every pixel, got one for every image")
    return counts


def _samples(counts: Tensor) -> int:
    """The n of (K,H,W) counts; raises ValueError unless they sum to it at every pixel."""
    if counts.ndim != 3 or len(counts) < 2 or counts[0].numel() == 0:
        raise ValueError(f"expected (K,H,W) counts of two or more classes, got {tuple(counts.shape)}")
    totals = counts.sum(0)
    n = int(totals[0, 0])
    if n < 1 or (totals != n).any():
        raise ValueError("every pixel needs the same number of samples, at least 1")
    return n
