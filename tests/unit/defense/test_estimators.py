import math

import pytest
import torch
from torch import Tensor

from defense.estimators import (
    CoordinateGradientEstimator,
    Estimator,
    Isotropic,
    Loss,
    Points,
    RandomGradientEstimator,
    sample_directions,
)

D = 24
DRAWS = 4000


def linear(gradient: Tensor) -> Loss:
    return Loss(lambda points: points.z @ gradient)


def quadratic(hessian: Tensor, gradient: Tensor) -> Loss:
    return Loss(lambda points: 0.5 * torch.einsum("ni,ij,nj->n", points.z, hessian, points.z) + points.z @ gradient)


def many_estimates(estimator: Estimator, loss, z: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """(draws, d) independent estimates at one and the same point."""
    generator = torch.Generator().manual_seed(seed)
    return estimator(z.expand(draws, -1), loss, generator).gradient


def symmetric(seed: int) -> Tensor:
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(seed))
    return (matrix + matrix.T) / 2


@pytest.fixture
def gradient() -> Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("sampling", ["sphere", "gaussian", "orthonormal"])
def test_directions_have_covariance_one_over_d(sampling):
    directions = sample_directions(20_000, 2, D, sampling, torch.Generator().manual_seed(1)).flatten(0, 1)
    covariance = directions.T @ directions / len(directions)
    torch.testing.assert_close(covariance, torch.eye(D) / D, atol=2e-3, rtol=0)


@pytest.mark.parametrize("count", [1, 5, D])
def test_orthonormal_directions_are_orthonormal(count):
    directions = sample_directions(3, count, D, "orthonormal", torch.Generator().manual_seed(1))
    gram = directions @ directions.transpose(1, 2)
    torch.testing.assert_close(gram, torch.eye(count).expand(3, -1, -1), atol=1e-5, rtol=0)


def test_more_orthonormal_directions_than_dimensions_are_refused():
    with pytest.raises(ValueError, match="25 orthonormal directions do not exist in 24 dimensions"):
        sample_directions(1, D + 1, D, "orthonormal", torch.Generator())


@pytest.mark.parametrize("sampling", ["sphere", "gaussian", "orthonormal"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_rge_is_unbiased_on_quadratics(gradient, sampling, difference):
    """Formula 1: the bias is zero for quadratics, whatever mu, since E[u u^T] = I / d and odd moments vanish."""
    hessian = symmetric(3)
    z = torch.randn(D, generator=torch.Generator().manual_seed(5))
    true = hessian @ z + gradient
    estimator = RandomGradientEstimator(4, mu=2.0, where=Isotropic(sampling), difference=difference)
    estimates = many_estimates(estimator, quadratic(hessian, gradient), z)
    standard_error = estimates.std(0) / math.sqrt(DRAWS)
    assert ((estimates.mean(0) - true).abs() < 5 * standard_error).all()


@pytest.mark.parametrize(
    ("sampling", "directions", "expected"),
    [
        ("sphere", 1, (D - 1) / 1),  # formula 2, sphere
        ("sphere", 6, (D - 1) / 6),
        ("gaussian", 6, (D + 1) / 6),  # formula 2, Gaussian
        ("orthonormal", 6, D / 6 - 1),  # formula 3
        ("orthonormal", D, 0.0),
    ],
)
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_mean_squared_error_of_rge_is_the_closed_form(gradient, sampling, directions, expected, difference):
    estimator = RandomGradientEstimator(directions, mu=0.1, where=Isotropic(sampling), difference=difference)
    estimates = many_estimates(estimator, linear(gradient), torch.zeros(D))
    errors = (estimates - gradient).square().sum(1) / gradient.square().sum()
    tolerance = 5 * errors.std().item() / math.sqrt(DRAWS) + 1e-6
    assert errors.mean().item() == pytest.approx(expected, abs=tolerance)


def test_forward_differences_add_the_curvature_term(gradient):
    """Formula 4: mu^2 (2 |H|_F^2 + (tr H)^2) d / (4 q (d + 2)) on top of formula 2."""
    hessian, mu, directions = symmetric(3), 2.0, 3
    estimator = RandomGradientEstimator(directions, mu=mu)
    estimates = many_estimates(estimator, quadratic(hessian, gradient), torch.zeros(D), draws=20_000)
    errors = (estimates - gradient).square().sum(1)
    curvature = mu**2 * (2 * hessian.square().sum() + hessian.trace() ** 2) * D / (4 * directions * (D + 2))
    expected = (D - 1) / directions * gradient.square().sum() + curvature
    assert curvature > 0.1 * expected  # or the test would not see it
    assert errors.mean().item() == pytest.approx(expected.item(), abs=5 * errors.std().item() / math.sqrt(20_000))


def test_central_cge_is_exact_on_quadratics(gradient):
    hessian = symmetric(3)
    z = torch.randn(2, D, generator=torch.Generator().manual_seed(5))
    estimate = CoordinateGradientEstimator(mu=0.5)(z, quadratic(hessian, gradient), torch.Generator())
    torch.testing.assert_close(estimate.gradient, z @ hessian + gradient, atol=1e-4, rtol=1e-4)


def test_forward_cge_is_biased_by_half_mu_times_the_diagonal_of_the_hessian(gradient):
    hessian, mu = symmetric(3), 0.5
    z = torch.randn(1, D, generator=torch.Generator().manual_seed(5))
    estimate = CoordinateGradientEstimator(mu, "forward")(z, quadratic(hessian, gradient), torch.Generator())
    bias = estimate.gradient - (z @ hessian + gradient)
    torch.testing.assert_close(bias, mu / 2 * hessian.diag()[None], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("estimator", "evaluations"),
    [
        (RandomGradientEstimator(5, 0.1), 6),
        (RandomGradientEstimator(5, 0.1, difference="central"), 10),
        (CoordinateGradientEstimator(0.1), 2 * D),
        (CoordinateGradientEstimator(0.1, "forward"), D + 1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(D,), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_points_go_into_one_call_and_cost_what_was_announced(estimator, evaluations, shape, count):
    calls = []

    def black_box(points: Points) -> Tensor:
        calls.append((points.z.shape, points.owners.bincount().tolist()))
        return points.z.flatten(1).sum(1)

    z = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    estimate = estimator(z, Loss(black_box), torch.Generator().manual_seed(0))
    assert estimator.evaluations(D) == evaluations
    assert calls == [((count * evaluations, *shape), [evaluations] * count)]
    assert estimate.spent == count * evaluations
    assert estimate.gradient.shape == z.shape
    torch.testing.assert_close(estimate.loss, z.flatten(1).sum(1), atol=1e-4, rtol=1e-4)


def test_the_generator_decides_everything(gradient):
    estimator = RandomGradientEstimator(3, 0.1)
    first, second = (many_estimates(estimator, linear(gradient), torch.zeros(D), 5, seed=1) for _ in range(2))
    other = many_estimates(estimator, linear(gradient), torch.zeros(D), 5, seed=2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
