import numpy as np
import pytest

from training.measure.intervals import bootstrap_interval, nested_interval
from training.measure.results import finite


def test_bootstrap_interval_of_a_mean_has_the_normal_width() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.04)
    assert high == pytest.approx(values.mean() + half, abs=0.04)


def test_bootstrap_interval_follows_from_the_seed() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.2]
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4, resamples=20) != bootstrap_interval(values, seed=5, resamples=20)


def test_bootstrap_interval_of_a_median_admits_infinity() -> None:
    values = [1.0, 2.0, 3.0, float("inf"), float("inf")]
    low, high = bootstrap_interval(values, lambda drawn: np.median(drawn, axis=1))
    assert (low, high) == (1.0, float("inf"))
    assert (finite(low), finite(high)) == (1.0, None)


def test_bootstrap_interval_of_equal_values_is_a_point() -> None:
    assert bootstrap_interval([1.0] * 9) == (1.0, 1.0)


def test_bootstrap_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


def test_interval_of_one_seed_is_that_over_images() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(1, 400))
    low, high = nested_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)


def test_interval_over_seeds_is_wider_by_how_much_they_differ() -> None:
    rng = np.random.default_rng(2)
    seeds, images = 40, 400
    level = rng.normal(0.0, 1.0, size=(seeds, 1))
    shared = rng.normal(0.0, 2.0, size=(1, images))
    values = level + shared
    low, high = nested_interval(values)
    half = 1.96 * np.sqrt(level.var() / seeds + shared.var() / images)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_what_both_share_cancels_from_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(3)
    shared = rng.normal(0.0, 5.0, size=(1, 300))
    own = rng.normal(1.0, 0.5, size=(1, 300))
    low, high = nested_interval(shared + own, shared)
    half = 1.96 * own.std() / np.sqrt(300)
    assert (low, high) == pytest.approx((own.mean() - half, own.mean() + half), abs=0.02)


def test_interval_of_a_method_against_itself_is_nothing() -> None:
    values = np.random.default_rng(4).random((1, 50))
    assert nested_interval(values, values) == (0.0, 0.0)


@pytest.mark.parametrize(("shape", "reference"), [((0, 0), None), ((1, 4), (1, 5))])
def test_interval_of_nothing_or_of_other_images_is_refused(
    shape: tuple[int, int], reference: tuple[int, int] | None
) -> None:
    with pytest.raises(ValueError, match="on the same images"):
        nested_interval(np.zeros(shape), None if reference is None else np.zeros(reference))
