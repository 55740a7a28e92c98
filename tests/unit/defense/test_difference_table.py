import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from defense.difference_table import (
    Spacing,
    best_step,
    candidates,
    differences,
    optimal_step,
    resolved_spacings,
    table_noise,
)

ROWS = 64


def table(function, spacings=None, seed: int = 0) -> list[Spacing]:
    """The table of a function of (points, rows), at z = 0."""
    spacings = spacings or candidates(None)
    return [differences(mu, torch.stack([function(t) for t in (-mu, 0.0, mu, 2 * mu)])) for mu in spacings]


def polynomial(slope: float, curvature: float, third: float = 0.0):
    """Rows with random signs, so that the terms do not add up."""
    signs = torch.randint(2, (3, ROWS), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    return lambda t: signs[0] * slope * t + signs[1] * curvature * t**2 / 2 + signs[2] * third * t**3 / 6


def noisy(function, s: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda t: function(t) + s * torch.randn(ROWS, generator=generator, dtype=torch.float64)


def test_differences_of_a_polynomial_are_its_derivatives():
    (row,) = table(polynomial(2.0, 0.0), [0.1])
    assert (row.first, row.second, row.third) == pytest.approx((0.2, 0.0, 0.0), abs=1e-12)
    assert row.rows == pytest.approx(ROWS)
    (row,) = table(polynomial(0.0, 3.0), [0.1])
    assert (row.second, row.third) == pytest.approx((0.03, 0.0), abs=1e-12)
    (row,) = table(polynomial(0.0, 0.0, 5.0), [0.1])
    assert row.third == pytest.approx(5e-3)


def test_differences_of_noise_show_its_size_at_every_spacing_and_resolve_nothing():
    found = table(noisy(lambda t: torch.zeros(ROWS).double(), 0.3))
    for row in found:
        assert row.noise == pytest.approx(0.3, rel=0.25)
        assert row.error("forward") == pytest.approx(math.sqrt(1.5), rel=0.25)
        assert row.noise_dominated
    assert table_noise(found) == pytest.approx(0.3, rel=0.3)
    assert resolved_spacings(found, "forward") == []
    assert best_step(found, 0.3, "forward") is None
    assert best_step(found, 0.3, "central") is None


@pytest.mark.parametrize("s", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize(("slope", "curvature"), [(1.0, 1.0), (1.0, 20.0), (0.1, 0.1)])
def test_the_noise_is_found_below_slope_and_curvature(s, slope, curvature):
    assert table_noise(table(noisy(polynomial(slope, curvature), s))) == pytest.approx(s, rel=0.5)


@pytest.mark.parametrize("s", [1e-4, 1e-3, 1e-2])
def test_formula_5_is_the_step_of_least_error(s):
    slope, h, rho = 1.0, 2.0, 4.0
    steps = torch.logspace(-3, 1, 4001, dtype=torch.float64)
    forward = 2 * s**2 / steps**2 + steps**2 * h**2 / 4
    central = s**2 / (2 * steps**2) + steps**4 * rho**2 / 36
    exact = table(polynomial(slope, h, rho), [0.05])[0]
    # The noise of the differences is subtracted, and they have none here.
    exact = Spacing(
        exact.mu, exact.first, math.hypot(exact.second, 6**0.5 * s), math.hypot(exact.third, 20**0.5 * s), 9
    )
    assert optimal_step(s, exact, "forward") == pytest.approx(steps[forward.argmin()].item(), rel=0.02)
    assert optimal_step(s, exact, "central") == pytest.approx(steps[central.argmin()].item(), rel=0.02)


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("s", [1e-4, 1e-3, 1e-2])
def test_the_step_is_near_the_best_one_and_its_slopes_are_clear(difference, s):
    function = polynomial(1.0, 2.0, 4.0)
    noisy_function = noisy(function, s)
    found = table(noisy_function)
    mu = best_step(found, table_noise(found), difference)
    assert mu is not None
    h, rho = 2.0, 4.0
    best = (8 * s**2 / h**2) ** 0.25 if difference == "forward" else (3 * s / rho) ** (1 / 3)
    assert best / 3 <= mu <= 3 * best
    measured = noisy_function(mu) - noisy_function(0.0 if difference == "forward" else -mu)
    true = function(1e-6)
    assert torch.corrcoef(torch.stack([measured, true]))[0, 1] > 0.9


def test_a_staircase_is_not_resolved_where_nothing_or_a_lone_jump_is_seen():
    generator = torch.Generator().manual_seed(0)
    slopes, offsets = torch.rand(2, ROWS, generator=generator, dtype=torch.float64)
    unit = 0.05

    def staircase(t: float) -> Tensor:
        return ((slopes * t + offsets) / unit).round() * unit

    found = table(staircase)
    resolved = [row.mu for row in resolved_spacings(found, "forward")]
    assert min(resolved) > unit  # a step of a unit changes the loss by less than a unit
    assert max(resolved) == found[-1].mu
    mu = best_step(found, table_noise(found), "forward")
    assert mu is not None
    measured = staircase(mu) - staircase(0.0)
    assert torch.corrcoef(torch.stack([measured, slopes]))[0, 1] > 0.95


def test_a_loss_that_rises_on_both_sides_is_no_slope():
    found = table(lambda t: torch.full((ROWS,), abs(t), dtype=torch.float64))
    assert resolved_spacings(found, "forward") == []


def test_kinks_at_random_places_are_predicted_as_errors():
    # l(t) = g t + sum of c |t - p| over kinks p: what the differences see of them predicts how far off the slope is.
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(4000, generator=generator, dtype=torch.float64)
    places = 4 * torch.rand(4000, 40, generator=generator, dtype=torch.float64) - 2
    sizes = 0.3 * torch.randn(4000, 40, generator=generator, dtype=torch.float64)

    def kinked(t: float) -> Tensor:
        return slopes * t + (sizes * ((t - places).abs() - places.abs())).sum(1)

    true = slopes - (sizes * places.sign()).sum(1)
    for mu in (0.1, 0.3):
        row = differences(mu, torch.stack([kinked(t) for t in (-mu, 0.0, mu, 2 * mu)]))
        forward = (kinked(mu) - kinked(0.0)) / mu - true
        central = (kinked(mu) - kinked(-mu)) / (2 * mu) - true
        scale = row.first / mu
        assert row.error("forward") == pytest.approx(forward.square().mean().sqrt().item() / scale, rel=0.1)
        assert row.error("central") == pytest.approx(central.square().mean().sqrt().item() / scale, rel=0.1)


def test_one_moving_loss_among_many_is_counted_as_one():
    values = torch.zeros(4, ROWS)
    values[2:, 0] = 1.0
    assert differences(0.1, values).rows == pytest.approx(1.0)
    assert differences(0.1, torch.zeros(4, ROWS)).error("forward") == math.inf


@pytest.mark.parametrize("given", [1e-4, 0.005, 0.007, 0.3, 10.0])
def test_a_given_step_is_one_of_the_candidates(given):
    spacings = candidates(given)
    assert min(abs(one / given - 1) for one in spacings) < 1e-9
    assert all(later == pytest.approx(2 * one) for one, later in pairwise(spacings))
