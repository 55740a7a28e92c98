import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.smoothing import (
    ABSTAIN,
    certified_radius,
    certify,
    certify_counts,
    count_votes,
    largest_radius,
    linf_equivalent,
    lower_bound,
    predict_counts,
    sample_counts,
)

PHI_INVERSE = NormalDist().inv_cdf
SHAPE = (1, 4, 4)


class Linear:
    """Class 1 where <w, x> + b > 0: the smoothed classifier's radius is |<w, x> + b| / |w| exactly."""

    def __init__(self, bias: float = 0.0) -> None:
        self.weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
        self.bias = bias
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        score = (images * self.weights).flatten(1).sum(1) + self.bias
        return torch.stack([-score, score], dim=1)

    def image_at(self, distance: float) -> Tensor:
        """An image whose signed distance from the boundary is given."""
        norm = self.weights.norm()
        return self.weights / norm * (distance - self.bias / norm)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.05), (100, 0.001), (10_000, 0.001)])
def test_lower_bound_of_all_hits_is_the_nth_root_of_alpha(n: int, alpha: float) -> None:
    assert lower_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-12)


def test_lower_bound_of_one_hit_solves_its_defining_equation() -> None:
    n, alpha = 20, 0.01
    p = lower_bound(1, n, alpha)
    assert 1 - (1 - p) ** n == pytest.approx(alpha)  # P(at least one hit) = alpha


@pytest.mark.parametrize(("hits", "n"), [(3, 10), (60, 100), (99, 100)])
def test_lower_bound_leaves_alpha_in_the_binomial_tail(hits: int, n: int) -> None:
    p = lower_bound(hits, n, 0.05)
    tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits, n + 1))
    assert tail == pytest.approx(0.05)


def test_lower_bound_of_no_hit_is_zero() -> None:
    assert lower_bound(0, 50, 0.001) == 0.0


@pytest.mark.parametrize(("hits", "n", "alpha"), [(-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 1.0)])
def test_lower_bound_refuses_impossible_arguments(hits: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=r"must lie between"):
        lower_bound(hits, n, alpha)


def test_radius_is_sigma_times_the_normal_quantile() -> None:
    assert certified_radius(0.975, 0.25) == pytest.approx(0.25 * 1.959964, abs=1e-6)
    assert certified_radius(0.5, 0.25) == 0.0
    assert certified_radius(0.3, 0.25) == 0.0


@pytest.mark.parametrize(("n", "reach"), [(1000, 0.6155), (10_000, 0.800)])
def test_largest_radius_at_sigma_a_quarter(n: int, reach: float) -> None:
    assert largest_radius(n, 0.001, 0.25) == pytest.approx(0.25 * PHI_INVERSE(0.001 ** (1 / n)))
    assert largest_radius(n, 0.001, 0.25) == pytest.approx(reach, abs=1e-3)


def test_linf_equivalent_of_the_papers_image_size() -> None:
    assert 255 * linf_equivalent(0.75, (3, 224, 224)) == pytest.approx(0.49, abs=0.005)


def test_certificate_takes_class_from_selection_and_bound_from_estimation() -> None:
    certificate = certify_counts(torch.tensor([40, 60]), torch.tensor([10, 90]), sigma=0.5, alpha=0.001)
    assert certificate.label == 1
    assert certificate.radius == pytest.approx(0.5 * PHI_INVERSE(lower_bound(90, 100, 0.001)))


def test_certificate_with_all_hits() -> None:
    certificate = certify_counts(torch.tensor([0, 0, 10]), torch.tensor([0, 0, 100]), sigma=0.25, alpha=0.001)
    assert certificate.label == 2
    assert certificate.radius == pytest.approx(0.25 * PHI_INVERSE(0.001**0.01))
    assert not certificate.abstained


@pytest.mark.parametrize("estimation", [[50, 50], [45, 55], [90, 10]])
def test_certificate_abstains_when_the_bound_is_no_majority(estimation: list[int]) -> None:
    certificate = certify_counts(torch.tensor([4, 6]), torch.tensor(estimation), sigma=0.25, alpha=0.001)
    assert certificate.abstained
    assert (certificate.label, certificate.radius) == (ABSTAIN, 0.0)


@pytest.mark.parametrize(
    ("counts", "alpha", "answer"),
    [
        ([0, 10], 0.01, 1),  # two-sided p = 2 / 2^10
        ([0, 10], 0.001, ABSTAIN),
        ([10, 0], 0.01, 0),
        ([5, 5, 0], 0.999, ABSTAIN),  # a tie has p = 1
        ([3, 20, 100], 0.001, 2),
    ],
)
def test_prediction_abstains_when_the_lead_may_be_chance(counts: list[int], alpha: float, answer: int) -> None:
    assert predict_counts(torch.tensor(counts), alpha=alpha) == answer


def test_counts_sum_to_n_over_full_and_partial_batches() -> None:
    classifier = Linear()
    counts = sample_counts(classifier, torch.zeros(SHAPE), n=25, sigma=0.25, generator=generator(), batch=10)
    assert classifier.batches == [10, 10, 5]
    assert counts.sum() == 25
    assert (counts > 0).all()


def test_counts_follow_from_the_generator() -> None:
    first, second = (
        sample_counts(Linear(), torch.zeros(SHAPE), n=50, sigma=0.25, generator=generator(3)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_noise_has_the_given_deviation_and_is_not_clipped() -> None:
    seen = []

    def classifier(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 2)

    sample_counts(classifier, torch.ones(SHAPE), n=2000, sigma=0.25, generator=generator())
    noisy = torch.cat(seen)
    assert noisy.std().item() == pytest.approx(0.25, rel=0.02)
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.01)
    assert noisy.max() > 1.5


@pytest.mark.parametrize("distance", [0.1, 0.3, 0.5])
def test_certified_radius_of_a_linear_classifier_stays_below_the_true_one(distance: float) -> None:
    classifier = Linear(bias=0.4)
    image = classifier.image_at(distance)
    for seed in range(5):
        certificate = certify(classifier, image, sigma=0.25, n0=50, n=2000, alpha=0.001, generator=generator(seed))
        assert certificate.label == 1
        assert 0.7 * distance - 0.05 < certificate.radius <= distance


def test_certificate_is_wrong_no_more_often_than_alpha() -> None:
    classifier, distance, alpha = Linear(), 0.1, 0.2
    radii = [
        certify(
            classifier, classifier.image_at(distance), sigma=0.25, n0=20, n=100, alpha=alpha, generator=generator(seed)
        ).radius
        for seed in range(200)
    ]
    too_large = sum(radius > distance for radius in radii) / len(radii)
    assert too_large <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(radii))
    assert too_large > 0.02  # the bound is not empty either


def test_certify_and_predict_abstain_on_the_boundary() -> None:
    classifier = Linear()
    image = classifier.image_at(0.0)
    assert certify(classifier, image, sigma=0.25, n0=20, n=200, alpha=0.001, generator=generator()).abstained
    counts = sample_counts(classifier, image, n=200, sigma=0.25, generator=generator())
    assert predict_counts(counts, alpha=0.001) == ABSTAIN


def test_predict_answers_the_side_of_the_boundary() -> None:
    classifier = Linear()
    for side, distance in enumerate((-0.5, 0.5)):
        counts = sample_counts(classifier, classifier.image_at(distance), n=200, sigma=0.25, generator=generator())
        assert predict_counts(counts, alpha=0.001) == side


def test_masks_are_no_answer_for_an_image() -> None:
    settings = {"sigma": 0.25, "n0": 4, "n": 4, "alpha": 0.1, "generator": generator()}
    with pytest.raises(InvalidAnswer, match="got one for every pixel"):
        certify(lambda images: torch.zeros(len(images), 2, 4, 4), torch.zeros(SHAPE), **settings)


@pytest.mark.parametrize("answer", [torch.full((4, 2), float("nan")), torch.zeros(3, 2), torch.zeros(4)])
def test_answers_that_are_no_scores_are_refused(answer: Tensor) -> None:
    with pytest.raises(InvalidAnswer, match="expected 4 rows of finite scores"):
        sample_counts(lambda _: answer, torch.zeros(SHAPE), n=4, sigma=0.25, generator=generator())


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (4, 1, 5, 5), (4, 2, 0, 5)])
def test_a_class_without_an_alternative_is_refused(shape: tuple[int, ...]) -> None:
    """Its argmax is 0 whatever the image: it would be certified everywhere, and mean nothing."""
    with pytest.raises(InvalidAnswer, match="two or more classes at axis 1"):
        sample_counts(lambda _: torch.zeros(shape), torch.zeros(SHAPE), n=4, sigma=0.25, generator=generator())


@pytest.mark.parametrize(("n", "batch"), [(0, 8), (8, 0)])
def test_sampling_needs_at_least_one_sample_and_one_a_batch(n: int, batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample_counts(Linear(), torch.zeros(SHAPE), n=n, sigma=0.25, generator=generator(), batch=batch)


def test_votes_are_counted_by_class_and_pixel() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0], [0.0, 0.4, 0.6], [0.0, 0.9, 0.1]])
    assert count_votes(scores).tolist() == [1, 2, 1], "of equal scores the first counts"
    pixels = torch.rand((50, 4, 3, 5), generator=generator())
    expected = torch.nn.functional.one_hot(pixels.argmax(1), 4).sum(0).movedim(-1, 0)
    assert torch.equal(count_votes(pixels), expected)
    assert count_votes(pixels).dtype == torch.int64


@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 4, 4), (0, 2), (5, 2, 0, 4)])
def test_votes_need_two_classes_and_something_to_count(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidAnswer, match="two or more classes"):
        count_votes(torch.ones(shape))
