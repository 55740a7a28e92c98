"""Images attacked once, on the bare victim, and sent to every defense: what each makes of them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from defense.attacks import ATTACKS, craft, minimum_norms, scaled_norms
from services.protocol.client import Endpoint
from training.command.errors import UserError
from training.command.team import ALONE, Team
from training.measure.results import NO_DEFENSE, Row
from training.measure.scoring import main_score, scores

CLEAR_MARGIN: Final = 0.05
"""Lead of the first over the second probability from which on weights and URL must agree on the class."""

logger = logging.getLogger(__name__)


def check_weights(weights: Endpoint, endpoint: Endpoint, url: str, images: Tensor) -> None:
    """Raises UserError unless the service at the victim's URL answers as the weights that the attacks are crafted on.

    Images on which the weights are undecided do not count.
    """
    with torch.no_grad():
        top = weights(images).topk(2, dim=1)
    clear = top.values[:, 0] - top.values[:, 1] > CLEAR_MARGIN
    wrong = clear & (endpoint(images).argmax(dim=1) != top.indices[:, 0])
    differ = int(wrong.view(len(images), -1).any(dim=1).sum())
    if differ:
        raise UserError(
            f"--victim and --victim-url are different models: they disagree about {differ} of {len(images)} clean "
            f"images; give the weights that the service at {url} was started with"
        )


@dataclass(frozen=True)
class Defense:
    """One line of the table: what answers the images' scores, and what it cost to learn."""

    name: str
    endpoint: Callable[[Tensor], Tensor]
    queries: int


@dataclass(frozen=True)
class Experiment:
    """Everything that the rows of one evaluation share.

    Attributes:
        row: `training.measure.results.measured_row` of what they share.
        model: The bare victim, returning logits, on the device of the attacks.
        images: (N,C,H,W) float32 in [0,1], on the CPU.
        labels: (N,) int64 true classes, or (N,H,W) true masks.
        defenses: Where the images are sent, the bare victim first.
        team: The processes that share the images; all have all of the above.
    """

    row: Callable[..., Row]
    seed: int
    model: nn.Module
    device: torch.device
    images: Tensor
    labels: Tensor
    defenses: tuple[Defense, ...]
    team: Team = ALONE

    def run(self, attacks: Sequence[str], linf: Sequence[float], l2: Sequence[float]) -> list[Row]:
        """The rows of the images as they are, and of every attack, at sizes in units of [0,1]."""
        rows = self.clean()
        for attack in attacks:
            if ATTACKS[attack].minimum_norm:
                rows += self.minimal(attack)
                continue
            for epsilon in l2 if ATTACKS[attack].norm == "l2" else linf:
                rows += self.bounded(attack, epsilon)
        return rows

    def clean(self) -> list[Row]:
        """Scores on the images as they are."""
        return self._scores(self.images, "none", "none", None)

    def bounded(self, attack: str, epsilon: float) -> list[Row]:
        """Scores under one attack of size epsilon, in units of [0,1]."""
        return self._scores(self._craft(attack, epsilon), attack, ATTACKS[attack].norm, epsilon)

    def minimal(self, attack: str) -> list[Row]:
        """Scores and median norms under one minimum-norm attack."""
        adversarials = self._craft(attack, None)
        rows = self._scores(adversarials, attack, ATTACKS[attack].norm, None)
        norms = minimum_norms(
            self.model, self.images.to(self.device), adversarials.to(self.device), self.labels.to(self.device)
        ).cpu()
        right = norms > 0
        if not right.any():
            logger.warning("%s: the bare victim gets no image right, so there are no norms to report", attack)
            return rows
        for defense in self.defenses:
            if defense.name == NO_DEFENSE:
                rows.append(self._median(defense, attack, "median_l2", norms[right]))
            own = right.nonzero().squeeze(1)[self.team.share(int(right.sum()))]
            scaled = scaled_norms(defense.endpoint, self.images[own], adversarials[own], self.labels[own])
            rows.append(self._median(defense, attack, "median_l2_scaled", self.team.gather(scaled)))
        return rows

    def _craft(self, attack: str, epsilon: float | None) -> Tensor:
        own = self.team.share(len(self.images))
        images, labels = self.images[own].to(self.device), self.labels[own].to(self.device)
        return self.team.gather(craft(attack, self.model, images, labels, epsilon, seed=self.seed).cpu())

    def _scores(self, images: Tensor, attack: str, norm: str, epsilon: float | None) -> list[Row]:
        rows = []
        for defense in self.defenses:
            answers = self.team.gather(defense.endpoint(images[self.team.share(len(images))]).argmax(dim=1))
            for metric, values in scores(answers, self.labels).items():
                rows.append(self._row(defense, attack, norm, epsilon, metric, values))
            size, main = "" if epsilon is None else f" {epsilon:.4f}", main_score(answers, self.labels).mean().item()
            logger.info("%s%s: %s %.1f%%", attack, size, defense.name, 100 * main)
        return rows

    def _median(self, defense: Defense, attack: str, metric: str, norms: Tensor) -> Row:
        row = self._row(defense, attack, ATTACKS[attack].norm, None, metric, norms)
        logger.info("%s: %s %s %s", attack, defense.name, metric, "inf" if row.value is None else f"{row.value:.3f}")
        return row

    def _row(self, defense: Defense, attack: str, norm: str, epsilon: float | None, metric: str, values: Tensor) -> Row:
        return self.row(
            values.double().numpy(),
            attack=attack,
            norm=norm,
            epsilon=epsilon,
            defense=defense.name,
            metric=metric,
            queries=defense.queries,
        )
