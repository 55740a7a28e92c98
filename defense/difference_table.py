"""A table of differences of a noisy function: how large its noise is, and with which step its slopes can be measured.

After Moré and Wild (2011, SIAM J. Sci. Comput. 33; ECnoise), from l(z - mu u), l(z), l(z + mu u) and l(z + 2 mu u)
along random directions u: first differences show the slope, second the curvature, third mostly noise. Every spacing mu
is judged by its own differences, since no repetition shows the noise of rounded scores and 8-bit images. The table is
centred: beside a minimum, one-sided differences would look like a slope. Formula numbers are those of docs/theory.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from defense.estimators import Difference

PUBLISHED_MU = 0.005
"""The step of Zhang et al. (2022), in L2 norm; the smallest that is tried."""

SPACINGS = 9
"""Candidates for mu: 0.005 to 1.28."""

RESOLVED = 0.5
"""Largest relative error of a slope that counts as clear: a correlation with the true slopes of 0.9."""

_NEIGHBOUR = 0.7
_FEWEST_ROWS = 2.0
_LONE = 0.25
_AS_CLEAR = 2.0, 0.1  # a step may be twice as unclear as the clearest one, and need not be clearer than this
_NOISE_DOMINATED = 0.9  # |third| / |second|: 1.83 for noise, far below 1 where the loss is smooth
_SAME_NOISE = 1.7  # noise does not grow with the step, that of rounding with its square root: 1.4 from one to the next
_THIRD = 20**0.5  # the third difference of white noise of deviation 1: sqrt(1 + 9 + 9 + 1)
_KINK = 0.41  # error of a central difference per third difference, both of kinks at random places: 1 / sqrt(6)


@dataclass(frozen=True)
class Spacing:
    """One row of the difference table: its step `mu` (L2) and root mean square differences, in nats.

    Attributes:
        first: Of l(z + mu u) - l(z) and l(z) - l(z - mu u).
        second: Of the second difference centred on z.
        third: Of the third difference.
        rows: How many (image, direction) pairs share in `first`: 1 if one moves and all others stand still.
    """

    mu: float
    first: float
    second: float
    third: float
    rows: float

    def error(self, difference: Difference) -> float:
        """Predicted error of a slope that is measured with this step, relative to the slope; infinite where it is 0.

        Forward, |second| / (sqrt(2) |first|): right for the kinks of a ReLU network, 1.4 times too large for smooth
        curvature; 1.2 where all is noise. Central, the smaller of what second and third difference show.
        """
        if self.first == 0.0:
            return math.inf
        if difference == "forward":
            return self.second / (math.sqrt(2) * self.first)
        return min(self.second / 2, _KINK * self.third) / self.first

    @property
    def noise(self) -> float:
        """Standard deviation of the loss, if all of the third difference is noise."""
        return self.third / _THIRD

    @property
    def noise_dominated(self) -> bool:
        """Whether the differences grow with their order, as those of noise do."""
        return self.third > 0 and self.third >= _NOISE_DOMINATED * self.second


def best_step(table: Sequence[Spacing], noise: float, difference: Difference) -> float | None:
    """The step of formula 5, within a factor of sqrt(2) of a spacing that is about as clear as the clearest one.

    `table` is in rising order of mu, `noise` is s; None where no spacing is resolved.
    """
    resolved = resolved_spacings(table, difference)
    if not resolved:
        return None
    clearest = min(resolved, key=lambda one: one.error(difference))
    limit = max(_AS_CLEAR[0] * clearest.error(difference), _AS_CLEAR[1])
    clear = [one.mu for one in resolved if one.error(difference) <= limit]
    wanted = min(max(optimal_step(noise, clearest, difference), clear[0]), clear[-1])
    nearest = min(clear, key=lambda one: abs(math.log(one / wanted)))
    return min(max(wanted, nearest / math.sqrt(2)), nearest * math.sqrt(2))


def optimal_step(noise: float, spacing: Spacing, difference: Difference) -> float:
    """The step of least mean squared error (formula 5); infinity where no curvature is left.

    (8 s^2 / h^2)^(1/4) forward, (3 s / rho)^(1/3) central: h and rho are the root mean square second and third
    derivatives at `spacing`, noise of deviation s subtracted.
    """
    if difference == "forward":
        h = math.sqrt(max(spacing.second**2 - 6 * noise**2, 0.0)) / spacing.mu**2
        return math.inf if h == 0 else float((8 * noise**2 / h**2) ** 0.25)
    rho = math.sqrt(max(spacing.third**2 - _THIRD**2 * noise**2, 0.0)) / spacing.mu**3
    return math.inf if rho == 0 else float((3 * noise / rho) ** (1 / 3))


def candidates(given: float | None) -> list[float]:
    """Spacings, each twice the last, so that one's l(z + 2 mu u) is the next one's l(z + mu u); a given mu is one."""
    spacings = [PUBLISHED_MU * 2.0**k for k in range(SPACINGS)]
    if given is None:
        return spacings
    shift = given / min(spacings, key=lambda one: abs(math.log(one / given)))
    return [shift * one for one in spacings]


def differences(mu: float, values: Tensor) -> Spacing:
    """The row of the table from (4, R) losses at z - mu u, z, z + mu u and z + 2 mu u."""
    first = values.diff(dim=0)
    second = first.diff(dim=0)
    energy = first[:2].square().sum(0).double()
    rows = (energy.sum().square() / energy.square().sum().clamp_min(1e-300)).item()
    return Spacing(mu, _rms(first[:2]), _rms(second[:1]), _rms(second.diff(dim=0)), rows)


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def table_noise(table: Sequence[Spacing]) -> float:
    """The noise of the third differences: the largest on which the smallest spacings agree.

    Where not even the smallest spacing is dominated by noise, an upper bound of it.
    """
    if not table:
        return 0.0
    found = table[0].noise
    if not table[0].noise_dominated and found > 0:
        return found
    for spacing in table:  # of a staircase the smallest steps may show nothing at all
        if found > 0 and not (spacing.noise_dominated and spacing.noise <= _SAME_NOISE * found):
            break
        found = max(found, spacing.noise)
    return found


def resolved_spacings(table: Sequence[Spacing], difference: Difference) -> list[Spacing]:
    """The spacings at which slopes are clear, and a neighbour bears them out.

    More is asked of both where hardly more than one loss moves: one lucky row of noise would be enough.
    """
    errors = [one.error(difference) for one in table]
    found = []
    for k, spacing in enumerate(table):
        neighbour = min(errors[max(k - 1, 0) : k] + errors[k + 1 : k + 2])
        own, other = (RESOLVED, _NEIGHBOUR) if spacing.rows >= _FEWEST_ROWS else (_LONE, RESOLVED)
        if errors[k] <= own and neighbour <= other:
            found.append(spacing)
    return found
