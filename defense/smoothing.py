"""Randomised smoothing: certificates from counts under Gaussian noise.

Cohen, Rosenfeld and Kolter, ICML 2019 (section 3.2, theorem 1): the smoothed classifier answers the class that the base
classifier (a model, or a gateway and its victim behind HTTP) is most likely to give to x + N(0, sigma^2 I). Images,
sigma and radii are in units of [0,1]. The noise is not clipped, as the theorem asks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.errors import InvalidAnswer

ABSTAIN = -1
"""The label that stands for "no answer at this confidence"."""

BaseClassifier = Callable[[Tensor], Tensor]
"""(N,C,H,W) float32 -> (N,K) or (N,K,H,W) scores, of which only the largest of each image or pixel counts."""


@dataclass(frozen=True)
class Certificate:
    """What is known about one image.

    Attributes:
        label: The smoothed classifier's class, or `ABSTAIN`.
        radius: L2 radius in units of [0,1] within which `label` provably does not change; 0 when abstained.
        samples: Answers of the base classifier it rests on.
    """

    label: int
    radius: float
    samples: int

    @property
    def abstained(self) -> bool:
        """Whether there was no answer at this confidence."""
        return self.label == ABSTAIN


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """One-sided Clopper-Pearson bound, below the true probability in a share 1 - alpha of all experiments or more.

    Raises ValueError unless alpha is in (0,1) and 0 <= hits <= n, n >= 1.
    """
    check_alpha(alpha)
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits must lie between 0 and n >= 1, got {hits} of {n}")
    from scipy.stats import beta  # takes as long to import as all of the gateway but PyTorch

    return 0.0 if hits == 0 else float(beta.ppf(alpha, hits, n - hits + 1))


def certified_radius(p_lower: float, sigma: float) -> float:
    """Theorem 1: sigma * Phi^-1(p_lower), the runner-up bounded by 1 - p_lower; 0 for p_lower <= 1/2."""
    from scipy.stats import norm

    return sigma * float(norm.ppf(p_lower)) if p_lower > 0.5 else 0.0


def largest_radius(n: int, alpha: float, sigma: float) -> float:
    """The radius when all n samples agree: no image can be certified beyond it."""
    return certified_radius(lower_bound(n, n, alpha), sigma)


def linf_equivalent(radius: float, shape: tuple[int, int, int]) -> float:
    """Radius of the largest L-inf ball inside an L2 ball, radius / sqrt(C*H*W), for an image of shape (C,H,W)."""
    return radius / math.sqrt(math.prod(shape))


def certify_counts(selection: Tensor, estimation: Tensor, *, sigma: float, alpha: float) -> Certificate:
    """`Certify` on (K,) counts: n0 samples' choose the class, n others' estimate its probability.

    `alpha`, in (0,1), is the probability that the certificate is wrong.
    """
    label = int(selection.argmax())
    samples = int(selection.sum() + estimation.sum())
    p_lower = lower_bound(int(estimation[label]), int(estimation.sum()), alpha)
    if p_lower <= 0.5:
        return Certificate(ABSTAIN, 0.0, samples)
    return Certificate(label, certified_radius(p_lower, sigma), samples)


def predict_counts(counts: Tensor, *, alpha: float) -> int:
    """`Predict` on (K,) counts, K >= 2: the most frequent class, or `ABSTAIN` when its lead may be chance.

    `alpha`, in (0,1), is the probability that the answer is not the smoothed classifier's; two-sided binomial test.
    """
    check_alpha(alpha)
    first, second = torch.topk(counts, 2).values.tolist()
    from scipy.stats import binomtest

    if binomtest(first, first + second, 0.5).pvalue > alpha:
        return ABSTAIN
    return int(counts.argmax())


def count_votes(scores: Tensor) -> Tensor:
    """(K,) or (K,H,W) int64: how many of (N,K) or (N,K,H,W) finite scores have each class as their largest.

    Raises InvalidAnswer unless there are two or more classes and something to count.
    """
    if scores.shape[1] < 2 or scores.numel() == 0:
        # The one class of a single score is the largest everywhere, and would be certified everywhere.
        raise InvalidAnswer(
            f"expected scores of two or more classes at axis 1, got {tuple(scores.shape)}; a single probability p "
            "of the one class has to be answered as (1 - p, p)"
        )
    labels = scores.argmax(dim=1)
    # Class by class: the one-hot vectors of all answers would take K times eight bytes a pixel.
    return torch.stack([(labels == one).sum(dim=0) for one in range(scores.shape[1])])


def sample_counts(
    classifier: BaseClassifier, image: Tensor, *, n: int, sigma: float, generator: torch.Generator, batch: int = 1024
) -> Tensor:
    """Counts the base classifier's answers to `n` noisy copies of one image (C,H,W), `batch` in one call.

    The noise is drawn on the generator's device; returned are (K,) or (K,H,W) int64 counts on the CPU.

    Raises:
        InvalidAnswer: The answer is no finite (N,K) or (N,K,H,W) tensor with K >= 2, or changes its shape.
        ValueError: n or batch is below 1.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"n and batch must be at least 1, got {n} and {batch}")
    counts: Tensor | None = None
    for start in range(0, n, batch):
        size = min(batch, n - start)
        noise = torch.randn((size, *image.shape), generator=generator, device=generator.device)
        scores = classifier(image + sigma * noise.to(image.device))
        if scores.ndim not in (2, 4) or len(scores) != size or not torch.isfinite(scores).all():
            raise InvalidAnswer(f"expected {size} rows of finite scores, got a tensor of shape {tuple(scores.shape)}")
        hits = count_votes(scores).cpu()
        if counts is not None and counts.shape != hits.shape:
            raise InvalidAnswer("the classifier changed the shape of its answers between two batches")
        counts = hits if counts is None else counts + hits
    assert counts is not None  # n >= 1
    return counts


def certify(
    classifier: BaseClassifier,
    image: Tensor,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    generator: torch.Generator,
    batch: int = 1024,
    give_up: Callable[[Tensor], bool] | None = None,
) -> Certificate:
    """`Certify` of the paper on one image (C,H,W): n0 samples choose the class, n more bound its probability.

    With probability at least 1 - alpha over the noise, the smoothed classifier answers the certificate's label
    everywhere within its radius, or the certificate abstains. Arguments as in `sample_counts` and `certify_counts`;
    `give_up` may look at the (K,) counts of the n0 samples and spare the n others: the certificate then abstains.
    """
    selection = _of_image(sample_counts(classifier, image, n=n0, sigma=sigma, generator=generator, batch=batch))
    if give_up is not None and give_up(selection):
        return Certificate(ABSTAIN, 0.0, n0)
    estimation = sample_counts(classifier, image, n=n, sigma=sigma, generator=generator, batch=batch)
    return certify_counts(selection, estimation, sigma=sigma, alpha=alpha)


def _of_image(counts: Tensor) -> Tensor:
    """The (K,) counts of one image, or `InvalidAnswer` where they are (K,H,W)."""
    if counts.ndim != 1:
        raise InvalidAnswer(
            "expected a class for every image, got one for every pixel: defense.segmentation_smoothing certifies masks"
        )
    return counts


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha lies between 0 and 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
