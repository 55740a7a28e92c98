"""The black box as the defence sees it: a callable, a ledger of what it cost, and a probe of how exact it is."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from defense.errors import BudgetExhausted, InvalidAnswer
from defense.objectives import ScoreKind, stability_loss

_SUM_TOLERANCE = 1e-2  # admits probabilities rounded to two digits; logits are far outside


class Victim(Protocol):
    """Anything that answers scores for images: HTTP in training, an analytic function in tests."""

    def __call__(self, images: Tensor) -> Tensor:
        """Answers (N, K) float32 scores for (N, C, H, W) float32 images in [0, 1]."""
        ...


class QueryLedger:
    """Counts every image sent to the victim, by purpose, and refuses what the budget does not hold.

    Safe to charge from several threads.

    Args:
        max_queries: The hard budget, in images; None: unlimited.
        spent: What earlier runs have spent already, by purpose.
        on_charge: Called with (purpose, images) before they are sent, so that a journal can outlive the process.
    """

    def __init__(
        self,
        max_queries: int | None = None,
        spent: Mapping[str, int] | None = None,
        on_charge: Callable[[str, int], None] | None = None,
    ) -> None:
        self.max_queries = max_queries
        self._spent = dict(spent or {})
        self._on_charge = on_charge
        self._lock = threading.Lock()

    def charge(self, purpose: str, images: int) -> None:
        """Records that `images` are about to be sent.

        Raises:
            BudgetExhausted: They exceed what is left; nothing is recorded.
        """
        with self._lock:
            total = sum(self._spent.values())
            if self.max_queries is not None and total + images > self.max_queries:
                raise BudgetExhausted(
                    f"the next {images} queries ({purpose}) exceed the budget: "
                    f"{total} of {self.max_queries} are spent; raise --max-queries to go on"
                )
            if self._on_charge is not None:
                self._on_charge(purpose, images)
            self._spent[purpose] = self._spent.get(purpose, 0) + images

    @property
    def spent(self) -> dict[str, int]:
        """What was spent so far, in images, by purpose."""
        with self._lock:
            return dict(self._spent)

    @property
    def total(self) -> int:
        """All images sent so far."""
        with self._lock:
            return sum(self._spent.values())

    @property
    def remaining(self) -> int | None:
        """Images that the budget still holds; None: unlimited."""
        return None if self.max_queries is None else self.max_queries - self.total


class MeteredVictim:
    """A victim whose every query is charged to a ledger and whose every answer is checked.

    Args:
        victim: The black box.
        ledger: Where the queries are charged, before they are sent.
        num_classes: K, once it is known; None accepts any K of at least 2.
        kind: What the scores are, once it is known; probabilities are checked to be distributions.
    """

    def __init__(
        self,
        victim: Victim,
        ledger: QueryLedger,
        num_classes: int | None = None,
        kind: ScoreKind | None = None,
    ) -> None:
        self.ledger = ledger
        self.num_classes = num_classes
        self.kind = kind
        self._victim = victim

    def query(self, images: Tensor, purpose: str) -> Tensor:
        """Asks the victim for the scores of (N, C, H, W) images in [0, 1].

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            purpose: What the queries are for, in the ledger.

        Returns:
            (N, K) float32 scores, on the device of the images.

        Raises:
            BudgetExhausted: The images exceed the budget; nothing was sent.
            InvalidAnswer: The answer has another shape, is not finite, or is no distribution although it should be.
        """
        self.ledger.charge(purpose, len(images))
        scores = self._victim(images).to(images.device, torch.float32)
        self._check(scores, len(images))
        return scores

    def _check(self, scores: Tensor, count: int) -> None:
        expected = "K" if self.num_classes is None else str(self.num_classes)
        if (
            scores.ndim != 2
            or scores.shape[0] != count
            or scores.shape[1] < 2
            or self.num_classes not in (None, scores.shape[1])
        ):
            raise InvalidAnswer(
                f"the victim answered scores of shape {tuple(scores.shape)} for {count} images; "
                f"expected ({count}, {expected})"
            )
        if not torch.isfinite(scores).all():
            raise InvalidAnswer("the victim answered scores that are not finite (NaN or infinity)")
        if self.kind == "probabilities" and not _is_distribution(scores):
            raise InvalidAnswer("the victim answered probabilities before, but this answer is no distribution")


@dataclass(frozen=True)
class ProbeReport:
    """What the probe found out about a victim.

    Attributes:
        num_classes: K.
        kind: Whether the scores are probabilities or logits.
        noise: Standard deviation of the stability loss between answers to one and the same image (s in the theory).
        response: Root mean square change of the stability loss along one random direction an image; like the noise,
            and like a batch's gradient, it is decided by the images on which the victim is unsure.
        mu: The length of that move, in the L2 norm of the space where the estimator steps.
    """

    num_classes: int
    kind: ScoreKind
    noise: float
    response: float
    mu: float

    @property
    def resolves_mu(self) -> bool:
        """Whether a finite difference at `mu` stands clear of the victim's noise."""
        return self.response > 10 * self.noise

    def describe(self) -> str:
        """One line for people."""
        verdict = "resolved" if self.resolves_mu else "NOT resolved: the estimates will be mostly noise, raise --mu"
        return (
            f"{self.num_classes} classes, {self.kind}; noise floor {self.noise:.1e}, "
            f"response at mu={self.mu:g} {self.response:.1e} ({verdict})"
        )


def probe(victim: MeteredVictim, images: Tensor, moved: Tensor, mu: float) -> ProbeReport:
    """Asks the victim four times about a small batch, to learn what it answers and how exactly.

    Spends 4 N queries with the purpose "probe": the batch twice, once more in reverse order and cut in two (another
    place in another batch size must not change an answer), and the moved images. Fixes the number of classes and the
    kind of scores on `victim`, so that every later answer is checked against them.

    Args:
        victim: The metered black box.
        images: (N, C, H, W) in [0, 1], N of at least 2.
        moved: (N, C, H, W) in [0, 1]: the images after a step of length `mu` in a random direction, each its own,
            where the estimator will take its steps.
        mu: The length of that step.

    Raises:
        BudgetExhausted: The budget does not hold 4 N queries.
        InvalidAnswer: The victim's answers are no scores.
    """
    first = victim.query(images, "probe")
    victim.num_classes = first.shape[1]
    kind: ScoreKind = "probabilities" if _is_distribution(first) else "logits"
    victim.kind = kind
    targets = first.argmax(1)
    again = victim.query(images, "probe")
    backwards = images.flip(0)
    half = len(images) // 2
    regrouped = torch.cat([victim.query(backwards[:half], "probe"), victim.query(backwards[half:], "probe")]).flip(0)
    stepped = victim.query(moved, "probe")

    losses = [stability_loss(scores, targets, kind) for scores in (first, again, regrouped)]
    # The difference of two equally noisy losses has twice the variance of one.
    squares = torch.stack([(losses[1] - losses[0]).square(), (losses[2] - losses[0]).square()])
    noise = (squares.mean() / 2).sqrt().item()
    response = (stability_loss(stepped, targets, kind) - losses[0]).square().mean().sqrt().item()
    return ProbeReport(first.shape[1], kind, noise, response, mu)


def _is_distribution(scores: Tensor) -> bool:
    sums = scores.sum(1)
    return bool((scores >= 0).all() and ((sums - 1).abs() <= _SUM_TOLERANCE).all())
