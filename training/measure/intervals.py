"""Bootstrap intervals of what was measured image by image."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Statistic = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""(R,n) resampled values -> (R,) statistics."""


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.float64],
    statistic: Statistic | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a statistic over images.

    The ends are order statistics, so they are never interpolated towards inf.

    Args:
        values: (n,) one number an image, n >= 1; inf is allowed.
        statistic: Computed along the last axis; the mean if None.
        level: Coverage, in (0,1).
        resamples: Number R of bootstrap samples.
        seed: Seed of the resampling.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("a bootstrap interval needs at least one value")
    picks = np.random.default_rng(seed).integers(array.size, size=(resamples, array.size))
    drawn = array[picks]
    statistics = drawn.mean(axis=1) if statistic is None else statistic(drawn)
    return _percentiles(statistics, level)


def nested_interval(
    values: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over seeds and images, or of the difference to a paired reference.

    Every resample draws images once, for all seeds and the reference, and seeds separately for values and reference.
    With few seeds it still understates how much seeds differ.

    Args:
        values: (S,n) one number a seed and image, S and n at least 1.
        reference: (T,n) another method's; the difference is values - reference.
        level: Coverage, in (0,1).
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.
    """
    if values.size == 0 or (reference is not None and reference.shape[1:] != values.shape[1:]):
        raise ValueError("an interval needs values, and a reference on the same images")
    rng = np.random.default_rng(seed)
    images = rng.integers(values.shape[1], size=(resamples, values.shape[1]))

    def drawn(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        seeds = rng.integers(len(table), size=(resamples, len(table)))
        means = np.stack([one[images].mean(axis=1) for one in table], axis=1)
        result: npt.NDArray[np.float64] = np.take_along_axis(means, seeds, axis=1).mean(axis=1)
        return result

    statistics = drawn(values) - (0.0 if reference is None else drawn(reference))
    return _percentiles(statistics, level)


def _percentiles(statistics: npt.NDArray[np.float64], level: float) -> tuple[float, float]:
    """The (low, high) order statistics that leave out (1 - level) / 2 on either side."""
    tail = (1 - level) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)
