"""How exactly a victim answers, and the step at which finite differences stand clear of its noise.

Noise is measured by repetitions and by a table of differences (`defense.difference_table`), which also sees rounded
scores, 8-bit images and labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.difference_table import (
    PUBLISHED_MU,
    RESOLVED,
    SPACINGS,
    Spacing,
    best_step,
    candidates,
    differences,
    resolved_spacings,
    table_noise,
)
from defense.errors import BudgetExhausted, DefenseError
from defense.estimators import Difference, sample_directions
from defense.objectives import ScoreKind, stability_loss
from defense.victims import MeteredVictim, is_distribution

_DIRECTIONS = 2  # an image
_DIGITS = 5
_ULP = 2.0**-22  # relative; float32 holds a rounded decimal to half of 2^-23
_SAME_STEP = 1.5  # spacings are a factor of 2 apart
_FORMULA: dict[Difference, str] = {"forward": "(8 s^2 / h^2)^(1/4)", "central": "(3 s / rho)^(1/3)"}


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found out about a victim.

    Attributes:
        num_classes: K.
        rounding: The decimal unit to which probabilities are rounded; None: they are not; 1: every answer was a label.
        noise: Standard deviation s of the stability loss, in nats.
        spacings: The difference table, in rising order of mu; empty where none was asked for.
        resolved: The spacings at which a slope stands clear.
        mu: The step to use: the given one where one was given, the published one where nothing decides it.
        given: Whether it was.
    """

    num_classes: int
    kind: ScoreKind
    rounding: float | None
    noise: float
    difference: Difference
    spacings: tuple[Spacing, ...]
    resolved: tuple[Spacing, ...]
    mu: float
    given: bool

    @property
    def label_only(self) -> bool:
        """Whether all answers were labels without scores."""
        return self.rounding == 1.0

    @property
    def is_resolved(self) -> bool:
        """Whether a finite difference at `mu` stands clear of noise and curvature."""
        return any(1 / _SAME_STEP < self.mu / one.mu < _SAME_STEP for one in self.resolved)

    @property
    def deciding(self) -> Spacing:
        """The spacing next to mu where that is resolved or given, else the clearest."""
        if self.is_resolved or self.given:
            return min(self.spacings, key=lambda one: max(one.mu / self.mu, self.mu / one.mu))
        return min(self.spacings, key=lambda one: one.error(self.difference))

    def describe(self) -> str:
        """One line for people."""
        rounded = "" if self.rounding is None else f" rounded to {self.rounding:g}"
        answers = "labels without scores" if self.label_only else f"{self.kind}{rounded}"
        found = f"{self.num_classes} classes, {answers}; noise floor s = {self.noise:.1e}"
        if not self.spacings:
            return found
        shown = self.deciding
        found += f", slope {shown.first / shown.mu:.1e}, curvature {shown.second / shown.mu**2:.1e} at {shown.mu:.3g}"
        error = f"relative error of a slope {shown.error(self.difference):.2f}"
        if self.is_resolved:
            why = "given" if self.given else f"formula 5, {_FORMULA[self.difference]}"
            return f"{found}: mu = {self.mu:.3g} ({why}) is resolved, {error}"
        others = "and no other step is"
        if self.resolved:
            others = f"but {self.resolved[0].mu:.3g} to {self.resolved[-1].mu:.3g} is: use --mu auto"
        if self.given:
            return f"{found}: mu = {self.mu:.3g} (given) is NOT resolved, {error}, {others}"
        return f"{found}: NOT resolved, {error}, from mu = {self.spacings[0].mu:.3g} to {self.spacings[-1].mu:.3g}"

    def require_step(self) -> None:
        """Raises an actionable DefenseError where differences estimate nothing and no step was given for its scores."""
        if not self.spacings:
            return
        if self.label_only:
            raise DefenseError(
                f"all of the victim's answers to the probe were labels: each gives one of its {self.num_classes} "
                "classes all of the probability. No difference can be taken of them. --votes V asks about V noisy "
                "copies of each image, at V queries, and takes the shares of their labels for probabilities; or "
                "choose a method that needs no differences (--estimator surrogate)"
            )
        if not (self.resolved or self.given):
            raise DefenseError(
                f"no step of finite differences stands clear of the victim's noise, at most {RESOLVED:g} would do: "
                f"{self.describe()}. Let it answer unrounded float32 scores to float32 tensors (--wire tensor), search "
                "where a step shows more (--sanitizer denoiser+autoencoder), raise --votes where there are any, or "
                "choose a method that needs no differences (--estimator surrogate); a number for --mu goes "
                "on all the same"
            )


def probe(
    victim: MeteredVictim,
    clean: Tensor,
    points: Tensor,
    decode: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    *,
    difference: Difference = "forward",
    mu: float | None = None,
    needs_differences: bool = True,
) -> ProbeReport:
    """Asks the victim about a small batch, to learn what it answers, how exactly, and which step that allows.

    Spends `probe_queries(N, needs_differences)` images as "probe": the clean images and the points; then, of the
    quarter with the largest loss (a sure victim hardly moves), the points again in other batches, and the difference
    table along two directions each. Fixes on `victim` what later answers are checked by.

    The victim's answers to `clean` (N, C, H, W) in [0, 1], N >= 2, are the targets of the loss. `points` (N, *shape)
    are where the estimator will step, which `decode` turns into images in [0, 1]. The generator is on the CPU. Formula
    5 chooses `mu` where it is None; without `needs_differences` there is no table.

    Raises:
        BudgetExhausted: The budget does not hold the probe; nothing was sent.
        InvalidAnswer: The victim's answers are no scores.
    """
    _refuse_small_budget(victim, probe_queries(len(clean), needs_differences))
    on_clean = victim.query(clean, "probe")
    victim.num_classes, victim.positions = on_clean.shape[1], tuple(on_clean.shape[2:])
    on_points = victim.query(decode(points), "probe")
    kind: ScoreKind = "probabilities" if is_distribution(torch.cat([on_clean, on_points])) else "logits"
    targets = on_clean.argmax(1)
    unsure = stability_loss(on_points, targets, kind)
    if kind == "probabilities":  # what was rounded, or underflowed, to zero cannot move
        movable = on_points.gather(1, targets.unsqueeze(1)).view(len(clean), -1) > 0
        unsure = unsure.where(movable.any(1), 0.0)
    looked_at = unsure.topk(_looked_at(len(clean))).indices
    points, targets, first = points[looked_at], targets[looked_at], on_points[looked_at]
    images = decode(points)
    again = victim.query(images, "probe")
    halves = images.flip(0).split(-(-len(images) // 2))
    regrouped = torch.cat([victim.query(half, "probe") for half in halves]).flip(0)

    spacings = candidates(mu) if needs_differences else []
    rows = torch.arange(len(points)).repeat_interleave(_DIRECTIONS)
    around = first[:0]
    if spacings:
        flat = points[rows].flatten(1)
        directions = sample_directions(len(rows), 1, flat.shape[1], "sphere", generator)[:, 0].to(flat)
        offsets = [*(-one for one in spacings), *spacings, 2 * spacings[-1]]
        moved = torch.cat([flat + offset * directions for offset in offsets])
        around = victim.query(decode(moved.view(-1, *points.shape[1:])), "probe")
    everything = torch.cat([on_clean, on_points, again, regrouped, around])
    rounding = _rounding(everything) if kind == "probabilities" else None
    victim.kind, victim.rounding = kind, rounding

    def losses(scores: Tensor, wanted: Tensor) -> Tensor:
        return stability_loss(victim.read(scores), wanted, kind)

    here = losses(first, targets)
    # The difference of two equally noisy losses has twice the variance of one.
    changes = torch.stack([losses(again, targets) - here, losses(regrouped, targets) - here])
    repeated = (changes.square().mean() / 2).sqrt().item()
    table: list[Spacing] = []
    if spacings:
        wanted = targets[rows.repeat(2 * SPACINGS + 1)]
        values = losses(around, wanted).view(-1, len(rows))
        below, above = values[: len(spacings)], values[len(spacings) :]
        table = [
            differences(spacing, torch.stack([below[k], here[rows], above[k], above[k + 1]]))
            for k, spacing in enumerate(spacings)
        ]
    noise = max(repeated, table_noise(table))
    decision = best_step(table, noise, difference)
    return ProbeReport(
        num_classes=victim.num_classes,
        kind=kind,
        rounding=rounding,
        noise=noise,
        difference=difference,
        spacings=tuple(table),
        resolved=tuple(resolved_spacings(table, difference)),
        mu=mu if mu is not None else PUBLISHED_MU if decision is None else decision,
        given=mu is not None,
    )


def probe_queries(images: int, needs_differences: bool = True) -> int:
    """How many images the probe sends for a batch of so many: 384 for 32."""
    looked_at = _looked_at(images)
    return 2 * images + looked_at * (2 + (_DIRECTIONS * (2 * SPACINGS + 1) if needs_differences else 0))


def _looked_at(images: int) -> int:
    return max(2, images // 4)


def _rounding(scores: Tensor) -> float | None:
    """The decimal unit of which all of the (N, K) scores are multiples, as exactly as float32 can hold them."""
    exact = scores.double()
    for digits in range(_DIGITS + 1):
        nearest = (exact * 10**digits).round() / 10**digits
        if bool(((exact - nearest).abs() <= _ULP * nearest).all()):
            return float(10.0**-digits)
    return None


def _refuse_small_budget(victim: MeteredVictim, images: int) -> None:
    needed, remaining = images * victim.queries_per_image, victim.ledger.remaining
    if remaining is not None and remaining < needed:
        raise BudgetExhausted(
            f"the probe of the victim takes {needed} queries, {remaining} are left: raise --max-queries"
        )
