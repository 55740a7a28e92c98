"""How the parts of the estimators go together: where they look, what they spend, and what they say of their error."""

import math

import pytest
import torch
from torch import Tensor, nn

from defense.autoencoders import Autoencoder
from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import (
    ControlVariate,
    CoordinateGradientEstimator,
    DecoderTangents,
    Estimator,
    ExactGradient,
    Extrapolation,
    FixedSpan,
    Guided,
    Isotropic,
    Loss,
    RandomGradientEstimator,
    Subspace,
    SurrogateGradient,
    SurrogateSpan,
    low_frequencies,
)

D = 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


class Counting:
    """A linear black box that counts its evaluations and whose answers carry noise."""

    def __init__(self, gradient: Tensor, noise: float = 0.0) -> None:
        self.gradient = gradient
        self.noise = noise
        self.calls: list[Tensor] = []
        self._source = generator(99)

    def __call__(self, points: Tensor, owners: Tensor) -> Tensor:
        self.calls.append(owners)
        return points.flatten(1) @ self.gradient + self.noise * torch.randn(len(points), generator=self._source)

    @property
    def spent(self) -> int:
        return sum(len(owners) for owners in self.calls)


def surrogate_loss(gradient: Tensor, known: Tensor, noise: float = 0.0) -> tuple[Loss, Counting]:
    black_box = Counting(gradient, noise)
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
        (ControlVariate(RANDOM), 3 * 4 + 2, 3 * 4),
        (CoordinateGradientEstimator(0.1), 3 * 2 * D, 3 * 2 * D),
        (CoordinateGradientEstimator(0.1, "forward"), 3 * (D + 1), 3 * (D + 1)),
        (SurrogateGradient(0, 0.1), 3, 3),
        (SurrogateGradient(8, 0.1), None, 3 + 3),
        (SurrogateGradient(8, 0.1), 1000, 3 + 3),
        (SurrogateGradient(0, 0.1, asked=2), 2, 2),
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
    assert estimate.loss.shape == estimate.error.shape == (3,)
    assert estimate.spent <= 3 * estimator.evaluations(D)


@pytest.mark.parametrize(
    ("estimator", "least"),
    [
        (RANDOM, 3 * 2),
        (RandomGradientEstimator(6, 0.1, difference="central"), 3 * 2),
        (ControlVariate(RANDOM), 3 * 2),
        (CoordinateGradientEstimator(0.1), 3 * 2 * D),
        (CoordinateGradientEstimator(0.1, "forward"), 3 * (D + 1)),
        (SurrogateGradient(0, 0.1), 3),
        (SurrogateGradient(8, 0.1), 3 + 3),
        (SurrogateGradient(0, 0.1, asked=2), 2),
        (Extrapolation(RANDOM, 2), 2 * 2),
    ],
    ids=repr,
)
def test_a_budget_below_the_least_is_refused_before_anything_is_spent(gradient, estimator, least):
    loss, black_box = surrogate_loss(gradient, gradient)
    with pytest.raises(BudgetExhausted, match=f"budget of {least - 1} evaluations|not {least - 1}"):
        estimator(normal(3, D, seed=1), loss, generator(), least - 1)
    assert black_box.spent == 0


@pytest.mark.parametrize(("difference", "base"), [("forward", 1), ("central", 0)])
def test_dead_coordinates_are_neither_paid_for_nor_estimated(gradient, difference, base):
    z = normal(2, D, seed=1)
    z[0, 5:] = 0.0
    z[1, ::2] = 0.0
    black_box = Counting(gradient)
    each = 2 - base
    estimator = CoordinateGradientEstimator(0.1, difference, live_only=True, noise=0.01)
    with pytest.raises(BudgetExhausted, match=f"takes {17 * each + 2 * base} evaluations"):
        estimator(z, Loss(black_box), generator(), 17 * each + 2 * base - 1)
    estimate = estimator(z, Loss(black_box), generator(), 17 * each + 2 * base)
    assert estimate.spent == black_box.spent == 17 * each + 2 * base
    torch.testing.assert_close(estimate.gradient, gradient * (z != 0), atol=1e-4, rtol=1e-4)
    assert estimate.error[1] / estimate.error[0] == pytest.approx(12 / 5)
    torch.testing.assert_close(estimate.loss, z @ gradient, atol=1e-4, rtol=1e-4)


# What they say of their error


@pytest.mark.parametrize(
    ("where", "combine"),
    [
        (Isotropic("sphere"), "unbiased"),
        (Isotropic("gaussian"), "unbiased"),
        (Isotropic("orthonormal"), "unbiased"),
        (Isotropic("orthonormal"), "projection"),
        (Isotropic("sphere"), "projection"),
    ],
    ids=str,
)
@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("directions", [2, 6])
def test_the_error_that_rge_states_is_its_error_in_the_mean(gradient, where, combine, difference, directions):
    estimator = RandomGradientEstimator(directions, 0.1, where, difference, combine)
    estimate = estimator(torch.zeros(8000, D), Loss(Counting(gradient)), generator())
    assert_stated_error(estimate.error, (estimate.gradient - gradient).square().sum(1))


def assert_stated_error(stated: Tensor, realised: Tensor) -> None:
    """Equal means, within five standard errors of their difference, which are small beside them."""
    standard_error = ((stated - realised).std() / math.sqrt(len(stated))).item()
    assert standard_error < 0.05 * realised.mean()
    assert stated.mean().item() == pytest.approx(realised.mean().item(), abs=5 * standard_error)


def test_the_error_that_the_control_variate_states_is_what_is_left(gradient):
    known = gradient + normal(D, seed=2)
    loss, _ = surrogate_loss(gradient, known)
    estimate = ControlVariate(RANDOM)(torch.zeros(8000, D), loss, generator())
    plain = RANDOM(torch.zeros(8000, D), loss, generator())
    assert_stated_error(estimate.error, (estimate.gradient - gradient).square().sum(1))
    assert estimate.error.mean() < 0.8 * plain.error.mean()


def test_the_error_that_rge_states_counts_the_noise(gradient):
    """With independent directions; d - 1 stands for d, which here is a difference of 4 %."""
    deviation, mu, directions = 0.3, 0.1, 6
    estimate = RandomGradientEstimator(directions, mu)(
        torch.zeros(8000, D), Loss(Counting(gradient, deviation)), generator()
    )
    realised = (estimate.gradient - gradient).square().sum(1).mean().item()
    assert realised == pytest.approx(
        (D - 1) / directions * gradient.square().sum().item() + D**2 / directions * 2 * deviation**2 / mu**2, rel=0.05
    )
    assert estimate.error.mean().item() == pytest.approx(realised, rel=0.1)


def test_the_surrogates_stated_error_is_a_lower_bound(gradient):
    along = normal(D, seed=2)
    loss, _ = surrogate_loss(gradient, along)
    estimate = SurrogateGradient(32, 0.1)(torch.zeros(32, D), loss, generator())
    realised = (estimate.gradient - gradient).square().sum(1)
    assert (estimate.error <= realised * (1 + 1e-4)).all()


# Where they look


def test_too_few_checks_to_confirm_anything_are_refused():
    with pytest.raises(ValueError, match="4 slopes cannot confirm a surrogate: check none, or at least 5"):
        SurrogateGradient(4, 0.1)


def test_the_lowest_frequencies_come_first_in_every_channel():
    rows = low_frequencies((2, 8, 8), 3)
    constant = torch.full((64,), 1 / 8)
    torch.testing.assert_close(rows[0], torch.cat([constant, torch.zeros(64)]))
    torch.testing.assert_close(rows[1], torch.cat([torch.zeros(64), constant]))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_error_that_guided_directions_state(count):
    """With others beside the surrogate's gradient, the stated error is the real one in the mean; alone it is zero."""
    draws = 4000
    true = torch.zeros(D)
    true[0] = 1.0
    known = torch.zeros(D)
    known[:2] = torch.tensor([0.8, 0.6])
    loss, _ = surrogate_loss(true, known)
    estimator = RandomGradientEstimator(count, 0.1, Guided(), combine="projection")
    estimate = estimator(torch.zeros(draws, D), loss, generator())
    real = (estimate.gradient - true).square().sum(1).mean()
    if count == 1:
        assert estimate.error.abs().max() < 1e-5
        assert real == pytest.approx(0.36, abs=1e-4)
    else:
        tolerance = 5 * estimate.error.std().item() / draws**0.5
        assert estimate.error.mean().item() == pytest.approx(real.item(), abs=tolerance)


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
    where = Subspace(FixedSpan(rows), 5)
    assert where.dimension(D) == 5
    estimate = RandomGradientEstimator(5, 0.1, where)(torch.zeros(4, D), Loss(Counting(gradient)), generator())
    torch.testing.assert_close(estimate.gradient, (rows.T @ (rows @ gradient)).expand(4, -1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate.error, torch.zeros(4))  # what lies outside it cannot see


def test_a_basis_of_each_images_own_is_used_for_that_image(gradient):
    rows = torch.linalg.qr(normal(3, D, 2, seed=1)).Q.transpose(1, 2)
    where = Subspace(lambda z, loss: rows, 2)
    estimate = RandomGradientEstimator(2, 0.1, where)(torch.zeros(3, D), Loss(Counting(gradient)), generator())
    expected = torch.einsum("nrd,nre,e->nd", rows, rows, gradient)
    torch.testing.assert_close(estimate.gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_the_rotated_share_of_a_subspace_is_new_at_each_step_and_the_rest_stays(own):
    rows = torch.linalg.qr(normal(D, 8, seed=1)).Q.T
    basis = rows.expand(3, -1, -1) if own else rows
    where = Subspace(lambda z, loss: basis, 8, rotated=0.25)
    source, spans = generator(), []
    for _ in range(2):
        drawn = where.draw(torch.zeros(3, D), 8, Loss(Counting(rows[0])), source)
        assert drawn.shape == (3, 8, D)
        assert_orthonormal(drawn)
        projector = drawn.transpose(1, 2) @ drawn
        torch.testing.assert_close(projector[0], projector[2], atol=1e-5, rtol=0)  # one span for the batch
        torch.testing.assert_close(projector[0] @ rows[:6].T, rows[:6].T, atol=1e-5, rtol=0)
        assert ((projector[0] @ rows[6:].T).norm(dim=0) < 0.99).all()
        spans.append(projector[0])
    assert (spans[0] - spans[1]).norm() > 0.5


def test_over_many_steps_a_rotated_subspace_sees_everything():
    rows = torch.eye(D)[:4]
    where = Subspace(FixedSpan(rows), 4, rotated=0.5)
    source, seen = generator(), torch.zeros(D)
    for _ in range(200):
        drawn = where.draw(torch.zeros(1, D), 4, Loss(Counting(rows[0])), source)[0]
        seen += drawn.square().sum(0) / 200
    torch.testing.assert_close(seen[:2], torch.ones(2), atol=1e-4, rtol=0)
    assert (seen[2:] > 0.05).all()
    assert seen.sum().item() == pytest.approx(4, abs=1e-3)


def test_the_surrogates_span_is_that_of_its_gradients_at_the_batch():
    directions = torch.linalg.qr(normal(D, 3, seed=1)).Q.T
    weights = normal(10, 3, seed=2) * torch.tensor([5.0, 2.0, 0.01])
    gradients = weights @ directions
    loss = Loss(Counting(directions[0]), lambda points: (points * gradients).sum(1))
    rows = SurrogateSpan(2)(torch.zeros(10, D), loss)
    assert_orthonormal(rows)
    share = (gradients @ rows.T).square().sum() / gradients.square().sum()
    assert share > 0.999
    with pytest.raises(ValueError, match="10 gradients span no 11 dimensions"):
        SurrogateSpan(11)(torch.zeros(10, D), loss)


class Curved(Autoencoder):
    """A small autoencoder whose decoder is not linear."""

    def __init__(self) -> None:
        super().__init__((1, 4, 6), (5,))
        self.into = nn.Linear(D, 5)
        self.out = nn.Linear(5, D)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * normal(*parameter.shape, seed=number)

    def encode(self, images: Tensor) -> Tensor:
        return self.into(images.flatten(1))

    def decode(self, codes: Tensor) -> Tensor:
        return self.out(codes).tanh().view(-1, *self.shape)


def test_decoder_tangents_span_the_decoders_jacobian(gradient):
    autoencoder = Curved()
    z, where = normal(3, 1, 4, 6, seed=1), DecoderTangents(autoencoder)
    assert where.dimension(D) == 5
    loss = Loss(Counting(gradient))
    assert_orthonormal(where.draw(z, 3, loss, generator()))
    estimate = RandomGradientEstimator(5, 0.1, where, combine="projection")(z, loss, generator())
    for image, found in zip(z, estimate.gradient, strict=True):
        code = autoencoder.encode(image[None])[0].detach()
        jacobian = torch.func.jacrev(lambda c: autoencoder.decode(c[None]).flatten())(code)
        projector = jacobian @ torch.linalg.pinv(jacobian)
        torch.testing.assert_close(found.flatten(), projector @ gradient, atol=1e-3, rtol=1e-3)
        assert found.norm() < 0.9 * gradient.norm()


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


@pytest.mark.parametrize("where", [Guided(), DecoderTangents(Curved())], ids=["guided", "tangents"])
def test_directions_that_are_not_isotropic_are_combined_by_projection_only(where):
    with pytest.raises(ValueError, match="are not isotropic: combine them by projection"):
        RandomGradientEstimator(3, 0.1, where)


# What a surrogate is believed


def test_the_surrogates_gradient_is_scaled_by_what_the_slopes_say(gradient):
    known = 3 * gradient + normal(D, seed=2)
    loss, _ = surrogate_loss(gradient, known)
    estimate = SurrogateGradient(16, 0.1)(torch.zeros(20, D), loss, generator())
    factor = gradient @ known / known.square().sum()
    torch.testing.assert_close(estimate.gradient, (factor * known).expand(20, -1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_where_the_slopes_do_not_confirm_the_surrogate_the_estimate_is_zero(gradient, sign):
    other = normal(D, seed=2)
    other = other - (other @ gradient) / gradient.square().sum() * gradient
    loss, _ = surrogate_loss(gradient, sign * gradient + other)
    estimate = SurrogateGradient(16, 0.1)(torch.zeros(20, D), loss, generator())
    assert (estimate.gradient == 0).all()


def test_an_unchecked_surrogate_is_believed_as_it_is(gradient):
    known = normal(D, seed=2)
    loss, black_box = surrogate_loss(gradient, known)
    estimate = SurrogateGradient(0, 0.1)(torch.zeros(20, D), loss, generator())
    torch.testing.assert_close(estimate.gradient, known.expand(20, -1))
    assert estimate.spent == black_box.spent == 20


def test_of_an_image_that_the_black_box_is_not_asked_about_only_the_gradient_is_known(gradient):
    loss, black_box = surrogate_loss(gradient, 2 * gradient)
    estimate = SurrogateGradient(16, 0.1, asked=18)(torch.zeros(20, D), loss, generator())
    torch.testing.assert_close(estimate.gradient, gradient.expand(20, -1), atol=1e-3, rtol=1e-3)
    assert estimate.loss.isnan().nonzero().squeeze(1).tolist() == [18, 19]
    assert estimate.spent == black_box.spent == 18 + 16


@pytest.mark.parametrize("asked", [0, 7])
def test_more_images_cannot_be_checked_than_are_asked_about(asked):
    with pytest.raises(ValueError, match=f"8 of {asked} images cannot be checked"):
        SurrogateGradient(8, 0.1, asked=asked)


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
        ControlVariate(RANDOM),
        SurrogateGradient(5, 0.1),
        Extrapolation(RANDOM, 2),
        RandomGradientEstimator(3, 0.1, Guided(), combine="projection"),
        RandomGradientEstimator(2, 0.1, Subspace(SurrogateSpan(2), 2)),
    ],
    ids=["control", "surrogate", "extrapolated", "guided", "span"],
)
def test_what_needs_a_surrogate_says_so(gradient, estimator: Estimator):
    black_box = Counting(gradient)
    with pytest.raises(ValueError, match="needs a surrogate of the black box"):
        estimator(torch.zeros(3, D), Loss(black_box), generator())
    assert black_box.spent == 0


# The exact gradient


def test_the_exact_gradient_is_that_of_automatic_differentiation():
    z = normal(3, 2, 4, seed=1)
    loss = Loss(lambda points, owners: points.sin().flatten(1).prod(1))
    estimate = ExactGradient()(z, loss, generator())
    points = z.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(points.sin().flatten(1).prod(1).sum(), points)
    assert torch.equal(estimate.gradient, expected)
    assert estimate.error.tolist() == [0, 0, 0]
    assert (estimate.spent, ExactGradient().evaluations(D)) == (3, 1)
    assert not estimate.loss.requires_grad


def test_the_exact_gradient_of_a_black_box_is_refused():
    @torch.no_grad()
    def black_box(points: Tensor, owners: Tensor) -> Tensor:
        return points.sum(1)

    with pytest.raises(DefenseError, match="this victim is a black box"):
        ExactGradient()(normal(2, D, seed=1), Loss(black_box), generator())
