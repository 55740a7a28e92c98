"""How the parts of the estimators go together: where they look, and what they spend."""

import math

import pytest
import torch
from torch import Tensor

from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import (
    CoordinateGradientEstimator,
    Estimator,
    ExactGradient,
    Extrapolation,
    Guided,
    Loss,
    Points,
    RandomGradientEstimator,
    Subspace,
    SurrogateGradient,
    low_frequencies,
)

D = 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


class Counting:
    """A linear black box that counts its evaluations."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.calls: list[Points] = []

    def __call__(self, points: Points) -> Tensor:
        self.calls.append(points)
        return points.z.flatten(1) @ self.gradient

    @property
    def spent(self) -> int:
        return sum(len(points.z) for points in self.calls)


def surrogate_loss(gradient: Tensor, known: Tensor) -> tuple[Loss, Counting]:
    black_box = Counting(gradient)
    return Loss(black_box, lambda points: points.flatten(1) @ known), black_box


@pytest.fixture
def gradient() -> Tensor:
    return normal(D, seed=7)


def assert_orthonormal(rows: Tensor) -> None:
    gram = rows @ rows.transpose(-1, -2)
    torch.testing.assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-5, rtol=0)


# What they spend


RANDOM = RandomGradientEstimator(6, 0.1)


@pytest.mark.parametrize(
    ("estimator", "budget", "spent"),
    [
        (RANDOM, None, 3 * 7),
        (RANDOM, 3 * 7, 3 * 7),
        (RANDOM, 3 * 7 - 1, 3 * 6),  # as many directions as every image can have
        (RANDOM, 3 * 2, 3 * 2),
        (RANDOM, 10_000, 3 * 7),
        (RandomGradientEstimator(6, 0.1, difference="central"), 3 * 5, 3 * 4),
        (RandomGradientEstimator(6, 0.1, Guided(), combine="projection"), 3 * 4, 3 * 4),
        (CoordinateGradientEstimator(0.1), 3 * 2 * D, 3 * 2 * D),
        (CoordinateGradientEstimator(0.1, "forward"), 3 * (D + 1), 3 * (D + 1)),
        (SurrogateGradient(), 3, 3),
        (SurrogateGradient(), 1000, 3),
        (SurrogateGradient(asked=2), 2, 2),
        (Extrapolation(RANDOM, 2), None, 2 * 7),
    ],
    ids=repr,
)
def test_what_was_spent_is_what_was_evaluated_and_stays_in_the_budget(gradient, estimator, budget, spent):
    loss, black_box = surrogate_loss(gradient, gradient)
    estimate = estimator(normal(3, 2, 3, 4, seed=1), loss, generator(), budget)
    assert estimate.spent == black_box.spent == spent
    assert len(black_box.calls) == 1
    assert estimate.gradient.shape == (3, 2, 3, 4)
    assert estimate.loss.shape == (3,)
    assert estimate.spent <= 3 * estimator.evaluations(D)


@pytest.mark.parametrize(
    ("estimator", "asked"),
    [
        (RANDOM, 3),
        (RandomGradientEstimator(2, 0.1, difference="central"), 3),
        (CoordinateGradientEstimator(0.1), 3),
        (CoordinateGradientEstimator(0.1, "forward"), 3),
        (SurrogateGradient(asked=2), 2),
        (Extrapolation(RANDOM, 2), 2),
        (ExactGradient(), 3),
    ],
    ids=repr,
)
def test_the_points_say_whose_they_are_and_which_stand_for_their_images(gradient, estimator, asked):
    z, black_box = (
        100 * normal(3, 2, 3, 4, seed=1),
        Counting(gradient.requires_grad_(isinstance(estimator, ExactGradient))),
    )
    estimator(z, Loss(black_box, lambda points: points.flatten(1).sum(1)), generator())
    (points,) = black_box.calls
    assert ((points.z - z[points.owners]).flatten(1).norm(dim=1) < 0.11).all()
    assert points.owners[points.centers].tolist() == list(range(asked))
    if getattr(estimator, "difference", "forward") == "forward":
        assert torch.equal(points.z[points.centers], z[:asked])


@pytest.mark.parametrize(
    ("estimator", "least"),
    [
        (RANDOM, 3 * 2),
        (RandomGradientEstimator(6, 0.1, difference="central"), 3 * 2),
        (CoordinateGradientEstimator(0.1), 3 * 2 * D),
        (CoordinateGradientEstimator(0.1, "forward"), 3 * (D + 1)),
        (SurrogateGradient(), 3),
        (SurrogateGradient(asked=2), 2),
        (Extrapolation(RANDOM, 2), 2 * 2),
    ],
    ids=repr,
)
def test_a_budget_below_the_least_is_refused_before_anything_is_spent(gradient, estimator, least):
    loss, black_box = surrogate_loss(gradient, gradient)
    with pytest.raises(BudgetExhausted, match=f"budget of {least - 1} evaluations|not {least - 1}"):
        estimator(normal(3, D, seed=1), loss, generator(), least - 1)
    assert black_box.spent == 0


# Where they look


def test_the_lowest_frequencies_come_first_in_every_channel():
    rows = low_frequencies((2, 8, 8), 3)
    constant = torch.full((64,), 1 / 8)
    torch.testing.assert_close(rows[0], torch.cat([constant, torch.zeros(64)]))
    torch.testing.assert_close(rows[1], torch.cat([torch.zeros(64), constant]))


def test_low_frequencies_are_orthonormal_and_hold_what_is_smooth():
    shape = (2, 6, 8)
    rows = low_frequencies(shape, 3)
    assert rows.shape == (2 * 9, 2 * 6 * 8)
    assert_orthonormal(rows)
    assert low_frequencies(shape, 6).shape == (72, 96)
    flat = torch.zeros(shape)
    flat[1] = 1.0
    wave = torch.zeros(shape)
    wave[0] = torch.cos(math.pi * 2 * (torch.arange(6) + 0.5) / 6).unsqueeze(1)  # frequency 2 of the vertical axis
    fast = torch.zeros(shape)
    fast[0] = torch.cos(math.pi * 3 * (torch.arange(6) + 0.5) / 6).unsqueeze(1)
    for image, share in ((flat, 1.0), (wave, 1.0), (fast, 0.0)):
        energy = (rows @ image.flatten()).square().sum() / image.square().sum()
        assert energy.item() == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("side", [0, 7])
def test_frequencies_that_the_image_does_not_have_are_refused(side):
    with pytest.raises(ValueError, match="6 x 8 have 1 to 6 frequencies"):
        low_frequencies((1, 6, 8), side)


def test_all_directions_of_a_subspace_give_the_projection_on_it(gradient):
    rows = torch.linalg.qr(normal(D, 5, seed=1)).Q.T
    where = Subspace(rows)
    assert where.dimension(D) == 5
    estimate = RandomGradientEstimator(5, 0.1, where)(torch.zeros(4, D), Loss(Counting(gradient)), generator())
    torch.testing.assert_close(estimate.gradient, (rows.T @ (rows @ gradient)).expand(4, -1), atol=1e-4, rtol=1e-4)


def test_guided_directions_begin_with_the_surrogates_gradient(gradient):
    known = normal(D, seed=2)
    loss, _ = surrogate_loss(gradient, known)
    drawn = Guided().draw(torch.zeros(4, D), 5, loss, generator())
    torch.testing.assert_close(drawn[:, 0], (known / known.norm()).expand(4, -1))
    torch.testing.assert_close(drawn[:, 1:] @ known, torch.zeros(4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.norm(dim=2), torch.ones(4, 5))
    exact, _ = surrogate_loss(gradient, -3 * gradient)
    estimate = RandomGradientEstimator(1, 0.1, Guided(), combine="projection")(torch.zeros(2, D), exact, generator())
    torch.testing.assert_close(estimate.gradient, gradient.expand(2, -1), atol=1e-3, rtol=1e-3)  # whatever its sign


def test_a_guide_without_a_gradient_leaves_the_other_directions(gradient):
    loss, _ = surrogate_loss(gradient, torch.zeros(D))
    estimator = RandomGradientEstimator(7, 0.1, Guided(), combine="projection")
    estimate = estimator(torch.zeros(2000, D), loss, generator())
    relative = (estimate.gradient - gradient).square().sum(1) / gradient.square().sum()
    assert relative.mean().item() == pytest.approx(1 - 6 / D, abs=0.02)


def test_directions_that_are_not_isotropic_are_combined_by_projection_only():
    with pytest.raises(ValueError, match="are not isotropic: combine them by projection"):
        RandomGradientEstimator(3, 0.1, Guided())


# What a surrogate is believed


def test_the_surrogates_gradient_is_followed_as_it_is(gradient):
    known = normal(D, seed=2)
    loss, black_box = surrogate_loss(gradient, known)
    estimate = SurrogateGradient()(torch.zeros(20, D), loss, generator())
    torch.testing.assert_close(estimate.gradient, known.expand(20, -1))
    assert estimate.spent == black_box.spent == 20


def test_of_an_image_that_the_black_box_is_not_asked_about_only_the_gradient_is_known(gradient):
    loss, black_box = surrogate_loss(gradient, 2 * gradient)
    estimate = SurrogateGradient(asked=18)(torch.zeros(20, D), loss, generator())
    torch.testing.assert_close(estimate.gradient, 2 * gradient.expand(20, -1))
    assert estimate.loss.isnan().nonzero().squeeze(1).tolist() == [18, 19]
    assert estimate.spent == black_box.spent == 18


def test_images_that_are_not_measured_get_the_surrogates_gradient_at_the_rate_of_the_measured_ones(gradient):
    known = 3 * gradient
    loss, _ = surrogate_loss(gradient, known)
    estimate = Extrapolation(CoordinateGradientEstimator(0.1), 12)(normal(20, D, seed=1), loss, generator())
    torch.testing.assert_close(estimate.gradient, gradient.expand(20, -1), atol=1e-3, rtol=1e-3)
    assert estimate.loss.isnan().nonzero().squeeze(1).tolist() == list(range(12, 20))


def test_a_surrogate_that_measured_images_do_not_confirm_is_not_extrapolated(gradient):
    loss, _ = surrogate_loss(gradient, -gradient)
    estimate = Extrapolation(CoordinateGradientEstimator(0.1), 12)(normal(20, D, seed=1), loss, generator())
    torch.testing.assert_close(estimate.gradient[:12], gradient.expand(12, -1), atol=1e-3, rtol=1e-3)
    assert (estimate.gradient[12:] == 0).all()


@pytest.mark.parametrize(
    "estimator",
    [
        SurrogateGradient(),
        Extrapolation(RANDOM, 2),
        RandomGradientEstimator(3, 0.1, Guided(), combine="projection"),
    ],
    ids=["surrogate", "extrapolated", "guided"],
)
def test_what_needs_a_surrogate_says_so(gradient, estimator: Estimator):
    black_box = Counting(gradient)
    with pytest.raises(ValueError, match="needs a surrogate of the black box"):
        estimator(torch.zeros(3, D), Loss(black_box), generator())
    assert black_box.spent == 0


# The exact gradient


def test_the_exact_gradient_is_that_of_automatic_differentiation():
    z = normal(3, 2, 4, seed=1)
    loss = Loss(lambda points: points.z.sin().flatten(1).prod(1))
    estimate = ExactGradient()(z, loss, generator())
    points = z.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(points.sin().flatten(1).prod(1).sum(), points)
    assert torch.equal(estimate.gradient, expected)
    assert (estimate.spent, ExactGradient().evaluations(D)) == (3, 1)
    assert not estimate.loss.requires_grad


def test_the_exact_gradient_of_a_black_box_is_refused():
    @torch.no_grad()
    def black_box(points: Points) -> Tensor:
        return points.z.sum(1)

    with pytest.raises(DefenseError, match="this victim is a black box"):
        ExactGradient()(normal(2, D, seed=1), Loss(black_box), generator())
