"""The formulae of docs/theory.md that test_estimators.py does not check, each against its closed form.

Monte Carlo means are compared within five of their own standard errors, and each test says why it could fail.
"""

import math
from statistics import NormalDist

import pytest
import torch
from scipy.special import gammaln, jv
from scipy.stats import binom, ncx2
from torch import Tensor

from defense.estimators import (
    CoordinateGradientEstimator,
    Estimator,
    Guided,
    Isotropic,
    Loss,
    RandomGradientEstimator,
    Subspace,
    SurrogateGradient,
)
from defense.estimators.surrogate import trusted_factor
from defense.objectives import inject_gradient
from defense.smoothing import certified_radius, linf_equivalent, lower_bound

D = 24
PHI = NormalDist().cdf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def linear(gradient: Tensor, surrogate: Tensor | None = None) -> Loss:
    known = None if surrogate is None else lambda points: points @ surrogate
    return Loss(lambda points: points.z @ gradient, known)


def noisy(black_box, deviation: float, seed: int = 11) -> Loss:
    """A loss whose every evaluation carries fresh noise."""
    source = generator(seed)
    return Loss(
        lambda points: black_box(points.z) + deviation * torch.randn(len(points.z), generator=source).to(points.z)
    )


def estimates(estimator: Estimator, loss: Loss, z: Tensor, draws: int, seed: int = 0) -> Tensor:
    """(draws, d) estimates at one and the same point."""
    return estimator(z.expand(draws, -1), loss, generator(seed)).gradient


def assert_mean(values: Tensor, expected: float, slack: float = 0.0) -> None:
    """The mean of independent values is the expected one, within five standard errors and what is said to be slack."""
    standard_error = values.double().std().item() / math.sqrt(len(values))
    assert values.double().mean().item() == pytest.approx(expected, abs=5 * standard_error + slack)
    assert 5 * standard_error < 0.2 * abs(expected) + 1e-6  # or the comparison would say little


def with_cosine(gradient: Tensor, cosine: float, seed: int = 21) -> Tensor:
    """A vector of half the gradient's length at the given cosine to it."""
    along = gradient / gradient.norm()
    other = normal(len(gradient), seed=seed)
    other = other - (other @ along) * along
    return 0.5 * gradient.norm() * (cosine * along + math.sqrt(1 - cosine**2) * other / other.norm())


@pytest.fixture
def gradient() -> Tensor:
    return normal(D, seed=7)


# The scalar that carries the gradient of a black box


def test_the_injected_scalar_has_the_gradient_of_the_whole_pipeline():
    """With the true gradient at the border, the parameters get what automatic differentiation would give them."""
    images, weight = normal(6, 5, seed=1), normal(5, 4, seed=2).requires_grad_(True)

    def loss(points: Tensor) -> Tensor:
        return points.square().sum(1).sin() + points.prod(1)

    (whole,) = torch.autograd.grad(loss(torch.tanh(images @ weight)).mean(), weight)
    points = torch.tanh(images @ weight)
    border = points.detach().requires_grad_(True)
    (at_border,) = torch.autograd.grad(loss(border).sum(), border)
    (injected,) = torch.autograd.grad(inject_gradient(points, at_border), weight)
    torch.testing.assert_close(injected, whole)


# Formula 1


def ball_factor(radius: float, dimension: int) -> float:
    """The mean of cos(w . v) over the unit ball, |w| = radius: Gamma(d/2 + 1) (2 / radius)^(d/2) J_(d/2)(radius)."""
    half = dimension / 2
    return math.exp(gammaln(half + 1) + half * math.log(2 / radius)) * float(jv(half, radius))


@pytest.mark.parametrize("dimension", [3, D])
@pytest.mark.parametrize("sampling", ["sphere", "orthonormal", "gaussian"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_rge_is_the_gradient_of_the_smoothed_loss(dimension, sampling, difference):
    """Formula 1 on sum_k cos(w_k . z), whose average over the ball, and under Gaussian noise, is known."""
    waves, z = normal(3, dimension, seed=1), normal(dimension, seed=4)
    waves *= (torch.tensor([0.5, 1.0, 1.5]) / waves.norm(dim=1)).unsqueeze(1)
    mu, draws = 0.6 * math.sqrt(dimension), 40_000
    lengths = waves.norm(dim=1)
    if sampling == "gaussian":
        factors = torch.exp(-((mu * lengths) ** 2) / (2 * dimension))
    else:
        factors = torch.tensor([ball_factor(mu * length.item(), dimension) for length in lengths])
    slopes = -(waves @ z).sin()
    smoothed, true = (factors * slopes) @ waves, slopes @ waves
    loss = Loss(lambda points: (points.z @ waves.T).cos().sum(1))
    estimator = RandomGradientEstimator(3, mu, Isotropic(sampling), difference)
    found = estimates(estimator, loss, z, draws)
    standard_error = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - smoothed).abs() < 5 * standard_error).all()
    assert (smoothed - true).norm() > 5 * standard_error.norm()  # it is not just the gradient
    lipschitz, third = lengths.square().sum().item(), (lengths**3).sum().item()
    bias = (smoothed - true).norm().item()
    if sampling != "gaussian":
        assert bias <= mu * lipschitz * dimension / (dimension + 1)
        assert bias <= mu**2 * third * dimension / (2 * (dimension + 2))


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_the_bound_on_the_bias_is_attained_in_one_dimension(mu):
    """Formula 1: l = z |z| / 2 has L = 1 and gradient 0 at 0; in d = 1 the bound mu L d / (d + 1) is mu / 2."""
    loss = Loss(lambda points: (points.z * points.z.abs() / 2)[:, 0])
    found = estimates(RandomGradientEstimator(1, mu), loss, torch.zeros(1), 10)
    torch.testing.assert_close(found, torch.full((10, 1), mu / 2))


# Formula 2


@pytest.mark.parametrize("sampling", ["sphere", "gaussian"])
@pytest.mark.parametrize("directions", [1, 2, 20, 100])
def test_the_expected_cosine_of_independent_directions(sampling, directions):
    """Formula 2: sqrt(q / (q + d - 1)), times E chi_q / sqrt(q) where q is far below d, to 2 %."""
    dimension, draws = 192, 1000
    gradient = normal(dimension, seed=3)
    estimator = RandomGradientEstimator(directions, 0.1, Isotropic(sampling))
    found = estimates(estimator, linear(gradient), torch.zeros(dimension), draws)
    cosine = torch.cosine_similarity(found, gradient[None])
    rough = math.sqrt(directions / (directions + dimension - 1))
    assert_mean(cosine, chi_factor(directions) * rough, slack=0.02 * rough)
    if directions == 1:  # where the rule of thumb is 25 % too high
        assert cosine.mean() < 0.9 * rough


def chi_factor(count: int) -> float:
    """E chi_q / sqrt(q) = sqrt(2 / q) Gamma((q + 1) / 2) / Gamma(q / 2), about 1 - 1 / (4 q)."""
    return math.sqrt(2 / count) * math.exp(math.lgamma((count + 1) / 2) - math.lgamma(count / 2))


# Formula 3


@pytest.mark.parametrize("directions", [1, 6, 20, D])
def test_the_expected_cosine_of_orthonormal_directions(gradient, directions):
    """Formula 3: E cos^2 = q / d exactly, and E cos from the beta distribution of cos^2."""
    estimator = RandomGradientEstimator(directions, 0.1, Isotropic("orthonormal"))
    cosine = torch.cosine_similarity(estimates(estimator, linear(gradient), torch.zeros(D), 4000), gradient[None])
    share = directions / D
    assert_mean(cosine.square(), share, slack=1e-5)
    assert_mean(cosine, math.sqrt(share) * chi_factor(directions) / chi_factor(D), slack=1e-5)


@pytest.mark.parametrize("directions", [1, 6, 20, D])
def test_projection_is_the_unbiased_estimate_times_q_over_d(gradient, directions):
    """Formula 3: for orthonormal directions, draw by draw."""
    unbiased, projected = (
        estimates(
            RandomGradientEstimator(directions, 0.1, Isotropic("orthonormal"), combine=combine),
            linear(gradient),
            torch.zeros(D),
            50,
        )
        for combine in ("unbiased", "projection")
    )
    torch.testing.assert_close(projected, directions / D * unbiased, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sampling", ["sphere", "gaussian", "orthonormal"])
@pytest.mark.parametrize("directions", [1, 6, 18])
def test_mean_squared_error_of_the_projection(gradient, sampling, directions):
    """Formula 3: (1 - q/d)|g|^2, for whatever directions span a uniformly random subspace."""
    estimator = RandomGradientEstimator(directions, 0.1, Isotropic(sampling), combine="projection")
    found = estimates(estimator, linear(gradient), torch.zeros(D), 4000)
    relative = (found - gradient).square().sum(1) / gradient.square().sum()
    assert_mean(relative, 1 - directions / D, slack=1e-3)
    assert (found.norm(dim=1) <= gradient.norm() * 1.001).all()


@pytest.mark.parametrize(
    ("sampling", "variance"),
    [("sphere", (D - 1) / 6), ("gaussian", (D + 1) / 6), ("orthonormal", D / 6 - 1)],
)
def test_the_best_shrinkage_of_an_unbiased_estimate(gradient, sampling, variance):
    """Formula 3: 1 / (1 + v) is the best factor, and leaves v / (1 + v), v the relative error before."""
    found = estimates(RandomGradientEstimator(6, 0.1, Isotropic(sampling)), linear(gradient), torch.zeros(D), 4000)
    best = 1 / (1 + variance)
    error = {
        factor: (factor * found - gradient).square().sum(1) / gradient.square().sum()
        for factor in (0.7 * best, best, 1.4 * best)
    }
    assert_mean(error[best], variance / (1 + variance))
    assert error[best].mean() < min(error[0.7 * best].mean(), error[1.4 * best].mean())


# Formula 4


@pytest.mark.parametrize(("sampling", "factor"), [("orthonormal", D / (D + 2)), ("gaussian", (D + 4) / D)])
def test_the_curvature_term_of_other_directions(sampling, factor):
    """Formula 4 for orthonormal and Gaussian directions, at a point without a gradient, so that it is all there is."""
    matrix = normal(D, D, seed=3)
    hessian, mu, directions, draws = (matrix + matrix.T) / 2, 2.0, 3, 20_000
    loss = Loss(lambda points: 0.5 * torch.einsum("ni,ij,nj->n", points.z, hessian, points.z))
    found = estimates(RandomGradientEstimator(directions, mu, Isotropic(sampling)), loss, torch.zeros(D), draws)
    moment = (2 * hessian.square().sum() + hessian.trace() ** 2).item()
    assert_mean(found.square().sum(1), factor * mu**2 * moment / (4 * directions))
    central = RandomGradientEstimator(directions, mu, Isotropic(sampling), "central")
    torch.testing.assert_close(estimates(central, loss, torch.zeros(D), 10), torch.zeros(10, D), atol=1e-5, rtol=0)


def test_at_one_budget_central_differences_double_the_error(gradient):
    """Formula 4: n evaluations are n - 1 forward directions or n / 2 central ones: 2 (n - 1) / n times the error."""
    budget, draws = 20, 8000
    z, loss = torch.zeros(D).expand(draws, -1), linear(gradient)
    errors = {}
    for difference in ("forward", "central"):
        estimate = RandomGradientEstimator(100, 0.1, difference=difference)(z, loss, generator(), budget * draws)
        assert estimate.spent == budget * draws
        errors[difference] = (estimate.gradient - gradient).square().sum(1) / gradient.square().sum()
    assert_mean(errors["forward"], (D - 1) / (budget - 1))
    assert_mean(errors["central"], (D - 1) / (budget / 2))


# Formula 5


def test_forward_cge_stays_below_its_bound_and_attains_it():
    """Formula 5: |bias| <= (mu/2) L sqrt(d), with equality on (L/2)|z|^2."""
    lipschitz, mu, z = 3.0, 0.5, normal(1, D, seed=5)
    loss = Loss(lambda points: lipschitz / 2 * points.z.square().sum(1))
    bias = CoordinateGradientEstimator(mu, "forward")(z, loss, generator()).gradient - lipschitz * z
    assert bias.norm().item() == pytest.approx(mu / 2 * lipschitz * math.sqrt(D), rel=1e-3)


def test_central_cge_is_biased_by_the_third_derivative():
    """Formula 5: mu^2/6 times d^3 l / d z_j^3, which on (rho/6) sum z_j^3 attains the bound mu^2 rho sqrt(d) / 6."""
    third, mu, z = 2.0, 0.5, normal(1, D, seed=5)
    loss = Loss(lambda points: third / 6 * (points.z**3).sum(1))
    bias = CoordinateGradientEstimator(mu)(z, loss, generator()).gradient - third / 2 * z.square()
    torch.testing.assert_close(bias, torch.full((1, D), mu**2 * third / 6), atol=1e-4, rtol=1e-3)
    assert bias.norm().item() == pytest.approx(mu**2 * third * math.sqrt(D) / 6, rel=1e-3)


@pytest.mark.parametrize(("difference", "factor"), [("forward", 2.0), ("central", 0.5)])
def test_noise_of_cge(gradient, difference, factor):
    """Formula 5: 2 d s^2 / mu^2 forward, d s^2 / (2 mu^2) central."""
    deviation, mu = 0.05, 0.2
    loss = noisy(lambda points: points @ gradient, deviation)
    found = CoordinateGradientEstimator(mu, difference)(torch.zeros(2000, D), loss, generator()).gradient
    assert_mean((found - gradient).square().sum(1), factor * D * deviation**2 / mu**2, slack=1e-5)


@pytest.mark.parametrize(("difference", "factor"), [("forward", 2.0), ("central", 0.5)])
@pytest.mark.parametrize("sampling", ["sphere", "orthonormal"])
def test_noise_of_rge(difference, factor, sampling):
    """Formula 5: d / q times that of CGE, also where all forward differences share one noisy base."""
    deviation, mu, directions = 0.05, 0.2, 6
    estimator = RandomGradientEstimator(directions, mu, Isotropic(sampling), difference)
    found = estimates(estimator, noisy(lambda points: torch.zeros(len(points)), deviation), torch.zeros(D), 4000)
    assert_mean(found.square().sum(1), D / directions * factor * D * deviation**2 / mu**2)


def assert_minimum(errors: dict[float, float]) -> None:
    """The middle one of three steps has the least error, and clearly so."""
    below, best, above = errors.values()
    assert best < 0.9 * min(below, above)


def test_the_best_step_of_forward_cge():
    """Formula 5: (8 s^2 / L^2)^(1/4) minimises d (mu^2 L^2 / 4 + 2 s^2 / mu^2) on (L/2)|z|^2."""
    lipschitz, deviation, draws = 3.0, 0.01, 1000
    best = (8 * deviation**2 / lipschitz**2) ** 0.25
    loss = noisy(lambda points: lipschitz / 2 * points.square().sum(1), deviation)
    errors = {}
    for mu in (best / 2, best, 2 * best):
        found = estimates(CoordinateGradientEstimator(mu, "forward"), loss, torch.zeros(D), draws).square().sum(1)
        assert_mean(found, D * (mu**2 * lipschitz**2 / 4 + 2 * deviation**2 / mu**2))
        errors[mu] = found.mean().item()
    assert_minimum(errors)


def test_the_best_step_of_central_cge():
    """Formula 5: (3 s / rho)^(1/3) minimises d (mu^4 rho^2 / 36 + s^2 / (2 mu^2)) on (rho/6) sum z_j^3."""
    third, deviation, draws = 2.0, 0.01, 1000
    best = (3 * deviation / third) ** (1 / 3)
    loss = noisy(lambda points: third / 6 * (points**3).sum(1), deviation)
    errors = {}
    for mu in (best / 2, best, 2 * best):
        found = estimates(CoordinateGradientEstimator(mu), loss, torch.zeros(D), draws).square().sum(1)
        assert_mean(found, D * (mu**4 * third**2 / 36 + deviation**2 / (2 * mu**2)))
        errors[mu] = found.mean().item()
    assert_minimum(errors)


def test_the_best_step_along_random_directions_is_set_by_the_rms_curvature():
    """Formula 5, forward: kappa^2 = E (u'Hu)^2 = (2|H|_F^2 + (tr H)^2) / (d (d + 2)) takes the place of L^2."""
    matrix = normal(D, D, seed=3)
    hessian, deviation, directions, draws = (matrix + matrix.T) / 2, 0.02, 3, 4000
    curvature = ((2 * hessian.square().sum() + hessian.trace() ** 2) / (D * (D + 2))).sqrt().item()
    assert curvature < 0.5 * torch.linalg.matrix_norm(hessian, 2)  # so that L would have given another step
    best = (8 * deviation**2 / curvature**2) ** 0.25
    loss = noisy(lambda points: 0.5 * torch.einsum("ni,ij,nj->n", points, hessian, points), deviation)
    errors = {}
    for mu in (best / 2, best, 2 * best):
        found = estimates(RandomGradientEstimator(directions, mu), loss, torch.zeros(D), draws).square().sum(1)
        assert_mean(found, D**2 / directions * (mu**2 * curvature**2 / 4 + 2 * deviation**2 / mu**2))
        errors[mu] = found.mean().item()
    assert_minimum(errors)


def test_the_best_central_step_along_random_directions_is_set_by_the_rms_third_derivative():
    """Formula 5, central: tau^2 = E (T[u,u,u])^2 = (6|T|_F^2 + 9|tr T|^2) / (d (d + 2)(d + 4)) for rho^2."""
    waves, weights = normal(4, D, seed=8) / math.sqrt(D), torch.tensor([1.0, -2.0, 3.0, 0.5])
    gram = waves @ waves.T
    frobenius = (weights @ gram**3 @ weights).item()
    traces = ((weights * gram.diag()) @ waves).square().sum().item()
    slope = math.sqrt((6 * frobenius + 9 * traces) / (D * (D + 2) * (D + 4)))
    deviation, directions, draws = 0.01, 6, 20_000
    best = (3 * deviation / slope) ** (1 / 3)
    loss = noisy(lambda points: (points @ waves.T) ** 3 @ weights / 6, deviation)
    errors = {}
    for mu in (best / 2, best, 2 * best):
        # Orthonormal: between independent directions there would be a cross term, the square of the bias.
        estimator = RandomGradientEstimator(directions, mu, Isotropic("orthonormal"), "central")
        found = estimates(estimator, loss, torch.zeros(D), draws).square().sum(1)
        assert_mean(found, D**2 / directions * (mu**4 * slope**2 / 36 + deviation**2 / (2 * mu**2)))
        errors[mu] = found.mean().item()
    assert_minimum(errors)


@pytest.mark.parametrize("sampling", ["sphere", "orthonormal"])
def test_the_error_of_central_differences_where_there_is_a_gradient(sampling, gradient):
    """Formula 5: v |g|^2 + (d^2/q) mu^4 tau^2 / 36 + 2 v g.b, and (1 - 1/q)|b|^2 with independent directions."""
    third, mu, count, draws = 2.0, 4.0, 6, 40_000
    gradient = gradient.abs()  # along the bias, so that the mixed term is large
    loss = Loss(lambda points: points.z @ gradient + third / 6 * (points.z**3).sum(1))
    bias = torch.full((D,), mu**2 * third / (2 * (D + 2)))
    slope = 15 * D * third**2 / (D * (D + 2) * (D + 4))
    relative = (D - 1) / count if sampling == "sphere" else D / count - 1
    mixed = 2 * relative * (gradient @ bias).item()
    shared = (1 - 1 / count) * bias.square().sum().item() if sampling == "sphere" else 0.0
    expected = relative * gradient.square().sum().item() + D**2 / count * mu**4 * slope / 36 + mixed + shared
    found = estimates(RandomGradientEstimator(count, mu, Isotropic(sampling), "central"), loss, torch.zeros(D), draws)
    assert_mean((found - gradient).square().sum(1), expected)
    assert mixed > 0.1 * expected


# Formula 6


def control_variate(inner: RandomGradientEstimator, gradient: Tensor, known: Tensor, factor: float) -> Tensor:
    """(8000, d) beta h and RGE of what it leaves of a linear loss."""
    return factor * known + estimates(inner, linear(gradient - factor * known), torch.zeros(D), 8000)


def assert_unbiased(found: Tensor, gradient: Tensor) -> None:
    standard_error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - gradient).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.5])
def test_a_control_variate_is_unbiased_whatever_its_factor(gradient, factor):
    """Formula 6: mean g and error ((d-1)/q)|g - beta h|^2, for a factor fixed beforehand."""
    known = with_cosine(gradient, 0.7)
    found = control_variate(RandomGradientEstimator(4, 0.1), gradient, known, factor)
    assert_unbiased(found, gradient)
    expected = (D - 1) / 4 * (gradient - factor * known).square().sum().item()
    assert_mean((found - gradient).square().sum(1), expected)


@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.95])
@pytest.mark.parametrize(
    ("where", "combine", "relative"),
    [
        (Isotropic(), "unbiased", (D - 1) / 4),
        (Isotropic("gaussian"), "unbiased", (D + 1) / 4),
        (Isotropic("orthonormal"), "unbiased", D / 4 - 1),
        (Isotropic("orthonormal"), "projection", 1 - 4 / D),
    ],
    ids=["sphere", "gaussian", "orthonormal", "projection"],
)
def test_the_control_variate_leaves_one_minus_the_squared_cosine(gradient, cosine, where, combine, relative):
    """Formula 6: at the best factor c |g| / |h|, (1 - c^2) times the inner estimator's error."""
    inner = RandomGradientEstimator(4, 0.1, where, combine=combine)
    found = control_variate(inner, gradient, with_cosine(gradient, cosine), factor=cosine / 0.5)
    errors = (found - gradient).square().sum(1) / gradient.square().sum()
    assert_mean(errors, (1 - cosine**2) * relative, slack=1e-3 * relative)
    if combine == "unbiased":
        assert_unbiased(found, gradient)


@pytest.mark.parametrize("directions", [2, 12])
def test_where_the_biased_surrogate_is_better_a_step_and_where_it_is_not(gradient, directions):
    """Formula 6: beta h alone, (1 - c^2), beats (1 - c^2)(d - 1)/q below q = d - 1; projection beats both."""
    cosine = 0.7
    known, best = with_cosine(gradient, cosine), cosine / 0.5

    def error(found: Tensor) -> float:
        return ((found - gradient).square().sum(-1).mean() / gradient.square().sum()).item()

    sphere = RandomGradientEstimator(directions, 0.1)
    orthonormal = RandomGradientEstimator(directions, 0.1, Isotropic("orthonormal"), combine="projection")
    alone = error(best * known)
    assert alone == pytest.approx(1 - cosine**2, rel=1e-3)
    unbiased, projected = (error(control_variate(inner, gradient, known, best)) for inner in (sphere, orthonormal))
    assert projected < alone < unbiased


@pytest.mark.parametrize(("cosine", "directions"), [(0.3, 6), (0.9, 6), (0.9, 1)])
def test_guided_directions_see_the_surrogates_share_and_a_part_of_the_rest(gradient, cosine, directions):
    """Formula 6, the surrogate's gradient as first direction: (1 - c^2)(1 - (q - 1)/(d - 1))|g|^2."""
    estimator = RandomGradientEstimator(directions, 0.1, Guided(), combine="projection")
    loss = linear(gradient, with_cosine(gradient, cosine))
    errors = (estimates(estimator, loss, torch.zeros(D), 4000) - gradient).square().sum(1) / gradient.square().sum()
    assert_mean(errors, (1 - cosine**2) * (1 - (directions - 1) / (D - 1)), slack=1e-3)


def test_the_factor_of_a_trusted_surrogate_is_the_best_one(gradient):
    """The trust rule: sum g.h / sum |h|^2 over images, and zero for a surrogate that is orthogonal or opposed."""
    measured = gradient + 0.1 * normal(20, D, seed=2)
    for cosine in (0.0, -0.8):
        assert trusted_factor(measured, with_cosine(measured.mean(0), cosine).expand(20, -1)) == 0
    known = with_cosine(gradient, 0.8) + 0.1 * normal(20, D, seed=3)
    beta = trusted_factor(measured, known)
    errors = [(measured - factor * known).square().sum() for factor in (0.99 * beta, beta, 1.01 * beta)]
    assert errors[1] < min(errors[0], errors[2])


def chance_of_trust(log_deviation: float) -> Tensor:
    """Whether each of many surrogates that know nothing is trusted, over images of unequal slopes."""
    trials, pairs = 40_000, 100
    scale = (log_deviation * normal(trials, pairs, seed=3)).exp()
    measured, known = scale * normal(trials, pairs, seed=1), scale * normal(trials, pairs, seed=2)
    beta = trusted_factor(measured.unsqueeze(2), known.unsqueeze(2))
    assert (beta >= 0).all()
    return (beta > 0).float()


def test_chance_is_trusted_as_often_as_two_standard_errors_say():
    """Formula 6, the trust rule: for independent slopes with probability 1 - Phi(2) = 2.3 %."""
    assert_mean(chance_of_trust(0.0), 1 - PHI(2), slack=0.002)


@pytest.mark.parametrize("log_deviation", [1.0, 2.0, 3.0])
def test_a_few_images_with_large_slopes_do_not_buy_trust(log_deviation):
    """Formula 6, the trust rule, where slopes of both differ between images by orders of magnitude."""
    assert chance_of_trust(log_deviation).mean() < 1 - PHI(2) + 0.003


# Formula 7


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize(
    ("sampling", "combine"), [("orthonormal", "unbiased"), ("sphere", "unbiased"), ("orthonormal", "projection")]
)
def test_the_error_of_a_subspace_is_what_it_does_not_see_and_r_in_place_of_d(share, sampling, combine):
    """Formula 7: (1 - a) + a (r/q - 1) unbiased in it, 1 - a q / r projected, a the share of the gradient in it."""
    rank, directions, draws = 8, 3, 8000
    rows = torch.linalg.qr(normal(D, D, seed=5)).Q.T
    gradient = math.sqrt(share / rank) * rows[:rank].sum(0) + math.sqrt((1 - share) / (D - rank)) * rows[rank:].sum(0)
    where = Subspace(rows[:rank], sampling)
    estimator = RandomGradientEstimator(directions, 0.1, where, combine=combine)
    found = estimates(estimator, linear(gradient), torch.zeros(D), draws)
    if combine == "projection":
        expected = 1 - share * directions / rank
        cosine = torch.cosine_similarity(found, gradient[None])
        assert_mean(cosine.square(), share * directions / rank)
    else:
        inside = rank / directions - 1 if sampling == "orthonormal" else (rank - 1) / directions
        expected = (1 - share) + share * inside
    assert_mean((found - gradient).square().sum(1), expected)


# The error that matters: the parameters' gradient, averaged over the batch


def jacobian(seed: int, parameters: int = 10) -> Tensor:
    """(d, p) with unequal singular values, so that it is not isotropic."""
    return normal(D, parameters, seed=seed) * torch.logspace(0, -1.5, D).unsqueeze(1)


def parameter_error(sampling: str, gradient: Tensor, jac: Tensor, count: int) -> float:
    """E |J'(g_hat - g)|^2 of one image (docs/theory.md, formula 8)."""
    everywhere = (gradient.square().sum() * jac.square().sum()).item()
    seen = (gradient @ jac).square().sum().item()
    match sampling:
        case "sphere":
            return (D / (D + 2) * (everywhere + 2 * seen) - seen) / count
        case "gaussian":
            return (everywhere + seen) / count
        case _:
            return (D / count - 1) * (D * everywhere + (D - 2) * seen) / ((D + 2) * (D - 1))


@pytest.mark.parametrize("sampling", ["sphere", "gaussian", "orthonormal"])
@pytest.mark.parametrize("count", [1, 6])
def test_the_error_of_the_parameters_gradient_is_the_trace_formula(sampling, count, gradient):
    """Formula 8, for a Jacobian that is not isotropic: ((d - 1)/q)|J'g|^2 would be another number."""
    jac, gradient = jacobian(seed=9), gradient * torch.logspace(-1, 0, D)
    found = estimates(
        RandomGradientEstimator(count, 0.1, Isotropic(sampling)), linear(gradient), torch.zeros(D), 40_000
    )
    expected = parameter_error(sampling, gradient, jac, count)
    assert_mean(((found - gradient) @ jac).square().sum(1), expected)
    isotropic = (D - 1) / count * (gradient @ jac).square().sum().item()
    assert abs(isotropic / expected - 1) > 0.3


def test_an_isotropic_jacobian_gives_the_error_of_the_point_itself(gradient):
    """Formula 8 contains formulae 2 and 3: with J = I they are the same."""
    eye, energy = torch.eye(D), gradient.square().sum().item()
    assert parameter_error("sphere", gradient, eye, 5) == pytest.approx((D - 1) / 5 * energy)
    assert parameter_error("gaussian", gradient, eye, 5) == pytest.approx((D + 1) / 5 * energy)
    assert parameter_error("orthonormal", gradient, eye, 5) == pytest.approx((D / 5 - 1) * energy)


@pytest.mark.parametrize("images", [4, 32])
def test_errors_that_are_independent_between_images_average_out(images):
    """Formula 9: E |err|^2 = (1/B^2) sum of formula 8, and the cosine is about (1 + E|err|^2 / |mean|^2)^(-1/2)."""
    draws, count, parameters = 1000, 4, 300
    common = normal(D, seed=1)
    gradients = common + normal(images, D, seed=2)
    jacobians = torch.stack([jacobian(0, parameters) + 0.3 * jacobian(i + 1, parameters) for i in range(images)])
    true = torch.einsum("bd,bdp->p", gradients, jacobians) / images
    loss = Loss(lambda points: (points.z * gradients[points.owners % images]).sum(1))
    found = RandomGradientEstimator(count, 0.1)(torch.zeros(draws * images, D), loss, generator()).gradient
    mean = torch.einsum("nbd,bdp->np", found.view(draws, images, D), jacobians) / images
    per_image = [parameter_error("sphere", gradients[i], jacobians[i], count) for i in range(images)]
    expected = sum(per_image) / images**2
    assert_mean((mean - true).square().sum(1), expected)
    cosine = torch.cosine_similarity(mean, true[None])
    predicted = (1 + expected / true.square().sum().item()) ** -0.5
    assert_mean(cosine, predicted, slack=0.1 * predicted / math.sqrt(images))
    assert 0.2 < predicted < 0.98


def test_a_bias_that_images_share_does_not_average_out():
    """Formula 9: the error of beta h does not fall with the batch, that of RGE falls as 1 / B."""
    gradient, jac = normal(D, seed=1), jacobian(9)
    loss = linear(gradient, with_cosine(gradient, 0.9))

    def error(estimator: Estimator, images: int, draws: int = 2000) -> float:
        found = estimator(torch.zeros(draws * images, D), loss, generator()).gradient.view(draws, images, D).mean(1)
        return ((found - gradient) @ jac).square().sum(1).mean().item()

    biased, unbiased = SurrogateGradient(), RandomGradientEstimator(4, 0.1)
    assert error(biased, 64) == pytest.approx(error(biased, 4), rel=1e-4)
    assert error(unbiased, 4) / error(unbiased, 64) == pytest.approx(16, rel=0.15)


def test_the_best_number_of_directions_an_image():
    """Formula 9: variance x cost (q + 1)(S^2 + k G^2 / q) is least at q = sqrt(k) G / S, here sqrt(d - 1) = 4.8."""
    draws = 20_000
    gradients = normal(draws, D, seed=1)  # mean 0: G = S
    loss = Loss(lambda points: (points.z * gradients[points.owners]).sum(1))
    cost = {}
    for count in (1, 5, 20):
        found = RandomGradientEstimator(count, 0.1)(torch.zeros(draws, D), loss, generator()).gradient
        product = (count + 1) * found.square().sum(1)
        assert_mean(product, (count + 1) * (D + (D - 1) * D / count))
        cost[count] = product.mean().item()
    assert cost[5] < 0.9 * min(cost[1], cost[20])


# The certificate


@pytest.mark.parametrize("distance", [0.01, 0.2, 0.7])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
def test_the_certificate_of_a_half_space_is_its_distance(distance, sigma):
    """Theorem 1 is tight: for a linear classifier p = Phi(distance / sigma), and the radius is the distance."""
    assert certified_radius(PHI(distance / sigma), sigma) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("centre", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("dimension", [2, 16])
def test_no_step_inside_the_radius_changes_the_answer_of_another_classifier(centre, dimension):
    """Theorem 1 for the classifier "inside a ball", whose probabilities under noise are noncentral chi-square."""
    sigma = 0.5
    ball = 1.5 * sigma * math.sqrt(dimension) + centre

    def probability(place: float) -> float:
        return float(ncx2.cdf((ball / sigma) ** 2, dimension, (place / sigma) ** 2 + 1e-12))

    p = probability(centre)
    radius = certified_radius(p, sigma)
    assert radius > 0.2
    for step in (0.25 * radius, 0.5 * radius, radius):
        least = PHI(NormalDist().inv_cdf(p) - step / sigma)
        assert probability(centre + step) >= least >= 0.5 - 1e-9  # outwards, the worst direction
    assert probability(centre + 20 * radius) < 0.5  # an answer that can be changed at all


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_the_bound_exceeds_the_probability_at_most_in_alpha_of_all_experiments(n, alpha):
    """Clopper-Pearson: the exact chance of an overestimate is at most alpha for every p, and close to it for some."""
    bounds = [lower_bound(hits, n, alpha) for hits in range(n + 1)]
    hits = torch.arange(n + 1).numpy()
    chances = [
        float(binom.pmf(hits[torch.tensor(bounds) > p], n, p).sum()) for p in torch.linspace(0.02, 0.999, 200).tolist()
    ]
    assert max(chances) <= alpha * (1 + 1e-9)
    assert max(chances) > 0.7 * alpha


def test_the_largest_cube_inside_the_certified_ball():
    """The L-inf equivalent: the corner of the cube lies on the sphere, a slightly larger cube's does not."""
    shape, radius = (1, 8, 8), 0.5
    corner = torch.full(shape, linf_equivalent(radius, shape))
    assert corner.norm().item() == pytest.approx(radius)
