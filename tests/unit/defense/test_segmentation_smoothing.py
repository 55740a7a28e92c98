"""SegCertify against closed forms, brute force and Monte Carlo."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.segmentation_smoothing import (
    MaskCertificate,
    certify_mask,
    certify_mask_counts,
    holm,
    mask_radius,
    predict_mask_counts,
)
from defense.smoothing import ABSTAIN, predict_counts, sample_counts

PHI = NormalDist()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def threshold(images: Tensor) -> Tensor:
    """Every pixel for itself: class 1 where it is brighter than one half."""
    score = 20 * (images[:, :1] - 0.5)
    return torch.cat([-score, score], dim=1)


def textbook_holm(p_values: list[float], alpha: float) -> list[bool]:
    """Step by step, as Holm (1979) puts it."""
    rejected = [False] * len(p_values)
    left = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(left):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_holm_is_the_textbooks(count):
    rng = np.random.default_rng(count)
    for _ in range(50):
        p_values = rng.random(count) ** rng.integers(1, 8)
        assert holm(p_values, 0.05).tolist() == textbook_holm(p_values.tolist(), 0.05)


def test_holm_stops_at_the_first_that_does_not_pass():
    assert holm(np.array([0.001, 0.04, 0.0001, 0.9]), 0.05).tolist() == [True, False, True, False]
    assert holm(np.array([0.03, 0.04]), 0.05).tolist() == [False, False]  # 0.04 is below 0.05, but 0.03 above 0.025
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        holm(np.array([0.1]), 1.0)


@pytest.mark.parametrize(("tau", "sigma"), [(0.75, 0.25), (0.9, 0.5), (0.5, 0.25)])
def test_the_radius_is_that_of_tau(tau, sigma):
    assert mask_radius(tau, sigma) == pytest.approx(sigma * PHI.inv_cdf(tau))


@pytest.mark.parametrize("tau", [0.49, 1.0])
def test_a_tau_below_a_majority_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be at least"):
        mask_radius(tau, 0.25)


def test_some_pixel_is_wrong_no_more_often_than_alpha():
    """All pixels at p = tau exactly: whatever does not abstain claims too much."""
    tau, n, alpha, pixels, trials = 0.75, 40, 0.05, 12, 4000
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(trials):
        hits = torch.from_numpy(rng.binomial(n, tau, size=(3, pixels // 3)))
        estimation = torch.stack([n - hits, hits])
        selection = torch.stack([torch.zeros_like(hits), torch.ones_like(hits)])
        certificate = certify_mask_counts(selection, estimation, sigma=0.25, tau=tau, alpha=alpha)
        wrong += bool((certificate.labels != ABSTAIN).any())
    # Of discrete tests the chance is below alpha: exactly 1 - (1 - p)^pixels with p that of the first step's threshold.
    first = max(p for p in (binom.sf(k - 1, n, tau) for k in range(n + 1)) if p <= alpha / pixels)
    expected = 1 - (1 - first) ** pixels
    assert expected <= alpha
    assert wrong / trials == pytest.approx(expected, abs=4 * math.sqrt(expected / trials))


def test_counts_decide_pixel_by_pixel():
    selection = torch.tensor([[[1, 9]], [[9, 1]]])
    estimation = torch.tensor([[[0, 60]], [[100, 40]]])
    certificate = certify_mask_counts(selection, estimation, sigma=0.25, tau=0.75, alpha=0.001)
    assert certificate.labels.tolist() == [[1, ABSTAIN]]
    assert certificate.samples == 110
    assert certificate.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("selection", "estimation", "match"),
    [
        ([[[1, 1]], [[0, 0]]], [[[10, 100]], [[0, 0]]], "same number of samples"),
        ([[[1, 1]], [[0, 0]]], [[[0, 0]], [[0, 0]]], "same number of samples"),
        ([[[1, 1]]], [[[9, 9]]], "two or more classes"),
        ([[1, 1], [0, 0]], [[9, 9], [0, 0]], r"\(K,H,W\) counts"),
        ([[[1, 1]], [[0, 0]]], [[[9]], [[0]]], "two shapes"),
    ],
)
def test_counts_that_are_not_of_the_same_samples_are_refused(selection: list, estimation: list, match: str):
    with pytest.raises(ValueError, match=match):
        certify_mask_counts(torch.tensor(selection), torch.tensor(estimation), sigma=0.25, tau=0.75, alpha=0.01)


@pytest.mark.parametrize("wrong", [{"tau": 0.4}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_nothing_is_asked_where_the_answer_could_not_be_used(wrong: dict[str, float]):
    def unasked(images: Tensor) -> Tensor:
        raise AssertionError("the classifier was asked")

    settings = {"sigma": 0.25, "n0": 5, "n": 30, "tau": 0.75, "alpha": 0.1, "generator": generator()} | wrong
    with pytest.raises(ValueError, match="must"):
        certify_mask(unasked, torch.full((1, 4, 4), 0.5), **settings)


def test_certified_pixels_of_a_known_segmenter_hold_everywhere_in_the_radius():
    """A pixel at x answers 1 with probability Phi((x - 1/2) / sigma); within r of it, with at least that of x - r."""
    sigma, tau = 0.25, 0.75
    image = torch.linspace(0, 1, 64).view(1, 8, 8)
    certificate = certify_mask(
        threshold, image, sigma=sigma, n0=20, n=400, tau=tau, alpha=0.001, generator=generator(), batch=128
    )
    margins = (image[0] - 0.5).abs()
    settled = certificate.labels != ABSTAIN
    assert certificate.samples == 420
    assert settled.float().mean() > 0.2
    assert (certificate.labels[settled] == (image[0] > 0.5)[settled].long()).all()
    # The smoothed answer flips at the margin: every certified pixel is farther than the radius from it.
    assert (margins[settled] >= certificate.radius).all()
    # And hardly any of those well beyond it abstain.
    clear = margins > 1.8 * certificate.radius
    assert settled[clear].float().mean() > 0.9


def test_the_threshold_is_the_papers_unless_another_is_asked_for():
    settings = {"sigma": 0.25, "n0": 5, "n": 100, "alpha": 0.1}
    image = torch.full((1, 4, 4), 0.9)
    first = certify_mask(threshold, image, **settings, generator=generator())
    assert first.radius == pytest.approx(0.25 * PHI.inv_cdf(0.75))
    assert torch.equal(first.labels, certify_mask(threshold, image, **settings, generator=generator(), tau=0.75).labels)


def test_the_share_abstained_counts_pixels():
    assert MaskCertificate(torch.tensor([[0, ABSTAIN], [1, 1]]), 0.1, 9).abstained == 0.25


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_the_prediction_of_a_single_pixel_is_that_of_a_class(alpha: float):
    for first in range(21):
        for second in range(21 - first):
            counts = torch.tensor([first, second, 20 - first - second])
            assert predict_mask_counts(counts.view(3, 1, 1), alpha=alpha).item() == predict_counts(counts, alpha=alpha)


def test_predictions_of_many_pixels_share_one_alpha():
    """13 of 14: two-sided p = 30 / 2^14 = 0.0018, enough for one pixel at 0.01 and too little for each of six."""
    counts = torch.tensor([13, 1]).view(2, 1, 1)
    assert predict_mask_counts(counts, alpha=0.01).tolist() == [[0]]
    assert predict_mask_counts(counts.expand(2, 2, 3), alpha=0.01).tolist() == [[ABSTAIN] * 3] * 2
    assert predict_mask_counts(counts.expand(2, 1, 5), alpha=0.01).tolist() == [[0] * 5]


def test_some_prediction_is_wrong_no_more_often_than_alpha():
    """Where two classes are all but even, about half of what is answered is wrong."""
    n, alpha, trials, rng = 30, 0.2, 4000, np.random.default_rng(0)
    answered = wrong = 0
    for _ in range(trials):
        hits = torch.from_numpy(rng.binomial(n, 0.499, size=(2, 3)))
        labels = predict_mask_counts(torch.stack([hits, n - hits]), alpha=alpha)
        wrong += bool((labels == 0).any())
        answered += bool((labels != ABSTAIN).any())
    assert wrong / trials <= alpha + 4 * math.sqrt(alpha / trials)
    assert answered > 0.02 * trials  # the bound is not empty either


def test_the_prediction_is_the_smoothed_segmenters_or_none():
    image = torch.linspace(0, 1, 64).view(1, 8, 8)
    labels = predict_mask_counts(sample_counts(threshold, image, n=400, sigma=0.25, generator=generator()), alpha=0.001)
    settled = labels != ABSTAIN
    assert labels.dtype == torch.int64
    assert (labels[settled] == (image[0] > 0.5)[settled].long()).all()
    assert settled[(image[0] - 0.5).abs() > 0.15].all()
    assert not settled[(image[0] - 0.5).abs() < 0.01].any()
    with pytest.raises(ValueError, match="same number of samples"):
        predict_mask_counts(torch.tensor([[[3, 9]], [[0, 0]]]), alpha=0.1)


def test_the_noise_decides_and_the_batch_does_not():
    image = torch.full((1, 4, 4), 0.55)
    settings = {"sigma": 0.25, "n0": 5, "n": 30, "tau": 0.5, "alpha": 0.1}
    first, same, other = (
        certify_mask(threshold, image, **settings, generator=generator(seed), batch=1000).labels for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    counts = sample_counts(threshold, image, n=30, sigma=0.25, generator=generator(), batch=7)
    assert counts.shape == (2, 4, 4)
    assert (counts.sum(0) == 30).all()


def test_what_is_no_mask_is_refused():
    image = torch.full((1, 4, 4), 0.55)
    settings = {"sigma": 0.25, "n0": 5, "n": 30, "tau": 0.75, "alpha": 0.1, "generator": generator()}
    with pytest.raises(InvalidAnswer, match="a class for every pixel"):
        certify_mask(lambda images: threshold(images).mean((2, 3)), image, **settings)
    with pytest.raises(InvalidAnswer, match="two or more classes"):
        certify_mask(lambda images: threshold(images)[:, :1], image, **settings)
    with pytest.raises(InvalidAnswer, match="rows of finite scores"):
        certify_mask(lambda images: threshold(images)[1:], image, **settings)
    sizes = iter([4, 3])
    with pytest.raises(InvalidAnswer):
        certify_mask(lambda images: threshold(images)[..., : next(sizes)], image, **settings)
