"""The black box as the defense sees it: a callable, and a ledger of what it cost."""

import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from defense.errors import BudgetExhausted, InvalidAnswer
from defense.objectives import ScoreKind

_ROUNDED_BY = 0.005  # each of K probabilities rounded to two digits may be off by so much
_LARGEST_TOLERANCE = 0.25


class Victim(Protocol):
    """Anything that answers scores for images: HTTP in training, an analytic function in tests."""

    def __call__(self, images: Tensor) -> Tensor:
        """Answers float32 scores for (N, C, H, W) float32 images in [0, 1]: (N, K), or (N, K, H, W) of a segmenter."""
        ...


class QueryLedger:
    """Counts images sent to the victim, by purpose, and refuses what exceeds the budget (None: unlimited); thread-safe.

    `spent` is what earlier runs have spent; `on_charge` is called with (purpose, images) before they are sent, so that
    a journal can outlive the process.
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
        """Records images before they are sent; BudgetExhausted, nothing recorded, if they exceed what is left."""
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
        """Images sent so far, by purpose."""
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
    """A victim whose queries are charged to a ledger before they are sent and whose answers are checked.

    `num_classes` (K), `kind`, `rounding` (the decimal unit of its probabilities) and `positions` (the scores' axes
    behind the classes, () or (H, W)) are None until known; an image costs `queries_per_image`.
    """

    def __init__(
        self,
        victim: Victim,
        ledger: QueryLedger,
        num_classes: int | None = None,
        kind: ScoreKind | None = None,
        rounding: float | None = None,
        queries_per_image: int = 1,
        positions: tuple[int, ...] | None = None,
    ) -> None:
        self.ledger = ledger
        self.num_classes = num_classes
        self.positions = positions
        self.kind = kind
        self.rounding = rounding
        self.queries_per_image = queries_per_image
        self._victim = victim

    def query(self, images: Tensor, purpose: str) -> Tensor:
        """The victim's (N, K) or (N, K, H, W) float32 scores for (N, C, H, W) images in [0, 1], on their device.

        Raises:
            BudgetExhausted: The images exceed the budget; nothing was sent.
            InvalidAnswer: The answer has another shape, is not finite, or is no distribution although it should be.
        """
        self.ledger.charge(purpose, len(images) * self.queries_per_image)
        scores = self._victim(images).to(images.device, torch.float32)
        self._check(scores, images)
        return self.read(scores)

    def read(self, scores: Tensor) -> Tensor:
        """Rounded probabilities as they may have been: zeros become half of the unit to which they were rounded.

        The logarithm of a zero would drown all other differences. Labels (a unit of 1) are left as they are.
        """
        if self.kind != "probabilities" or self.rounding is None or self.rounding == 1.0:
            return scores
        return scores.clamp_min(self.rounding / 2)

    def _check(self, scores: Tensor, images: Tensor) -> None:
        answered = tuple(scores.shape)
        possible = ((), tuple(images.shape[2:])) if self.positions is None else (self.positions,)
        if (
            answered[:1] != (len(images),)
            or len(answered) < 2
            or answered[1] < 2
            or self.num_classes not in (None, answered[1])
            or answered[2:] not in possible
        ):
            classes = "K" if self.num_classes is None else str(self.num_classes)
            expected = " or ".join(f"({', '.join([str(len(images)), classes, *map(str, one)])})" for one in possible)
            raise InvalidAnswer(
                f"the victim answered scores of shape {answered} for {len(images)} images; expected {expected}"
            )
        if not torch.isfinite(scores).all():
            raise InvalidAnswer("the victim answered scores that are not finite (NaN or infinity)")
        if self.kind == "probabilities" and not is_distribution(scores):
            raise InvalidAnswer("the victim answered probabilities before, but this answer is no distribution")


def is_distribution(scores: Tensor) -> bool:
    """Whether (N, K, ...) scores are probabilities, also such as were rounded to two digits; logits are far outside."""
    tolerance = min(_ROUNDED_BY * scores.shape[1], _LARGEST_TOLERANCE) + 1e-3
    return bool((scores >= 0).all() and ((scores.sum(1) - 1).abs() <= tolerance).all())
