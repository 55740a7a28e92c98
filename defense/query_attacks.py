"""Attacks that see nothing but answers, as thin adapters over pyautoattack and foolbox.

`square` reads the scores (Andriushchenko et al., ECCV 2020; L-infinity), `hop_skip_jump` the decisions alone (Chen et
al., S&P 2020; L2, minimum-norm). Both attack many images at once, as their libraries do, and ask through an `Inquiry`,
which counts the queries of each image, ends the attack when they are spent, and remembers all that was answered: what
the attack gained is read there, and is the same whether it ended by itself or not.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from defense.attacks import BOUNDS, LOST, least_right
from defense.foolbox_parts import HopSkipJumpAttack, Misclassification, PyTorchModel
from defense.objectives import agreement

logger = logging.getLogger(__name__)

Scores = Callable[[Tensor], Tensor]
"""(N,C,H,W) in [0,1] -> probabilities (N,K) or (N,K,H,W); may raise `SpentError`."""

_TIES: Final = 1e-3
"""Weight of a mask's probabilities beside its Dice: between equal masks they show an attack which way to go."""


class SpentError(Exception):
    """There are no more answers to be had."""


class Inquiry:
    """Questions about the same images over and over, and what came of them.

    Args:
        scores: What is asked.
        images: (N,C,H,W) float32 in [0,1], the originals.
        wanted: (N,) classes or (N,H,W) masks that the answers are to be brought away from.
        limit: Most queries for each image.

    Attributes:
        asked: (N,) queries spent on each image so far.
    """

    def __init__(self, scores: Scores, images: Tensor, wanted: Tensor, limit: int) -> None:
        self.images, self.wanted, self.limit = images, wanted, limit
        self.asked = torch.zeros(len(images), dtype=torch.int64)
        self._scores = scores
        self._trail: list[tuple[Tensor, Tensor, Tensor]] = []  # owners, L2 distances, agreements

    def __call__(self, images: Tensor, owners: Tensor) -> Tensor:
        """Asks about changed images.

        Args:
            images: (M,C,H,W).
            owners: (M,) which of the originals each is; none twice.

        Returns:
            (M,) margins, above 0 while the answer holds: of a class its probability less the largest other one; of a
            mask its Dice less `LOST`, up to what its probabilities add to break ties.

        Raises:
            SpentError: One of them has had its queries; nothing was asked.
        """
        if bool((self.asked[owners] >= self.limit).any()):
            raise SpentError
        answered = self._scores(images)
        self.asked[owners] += 1
        wanted = self.wanted[owners]
        agreed = agreement(answered.argmax(1), wanted)
        distances = torch.linalg.vector_norm((images - self.images[owners]).flatten(1), dim=1)
        self._trail.append((owners, distances, agreed))
        if wanted.ndim == 1:
            own = answered.gather(1, wanted[:, None]).squeeze(1)
            return own - answered.scatter(1, wanted[:, None], -float("inf")).amax(1)
        inside = (wanted > 0).flatten(1)
        soft = (answered[:, 1:].sum(1).flatten(1) * inside).sum(1) / inside.sum(1).clamp_min(1)
        return agreed - LOST + _TIES * soft

    def least(self, within: float = float("inf")) -> Tensor:
        """(N,) the least agreement (1 or 0, or Dice) that was answered within an L2 distance; 1 where nothing was."""
        least = torch.ones(len(self.images))
        for owners, distances, agreed in self._trail:
            near = distances <= within
            least[owners[near]] = torch.minimum(least[owners[near]], agreed[near].float())
        return least

    def nearest(self) -> Tensor:
        """(N,) the least L2 distance at which the answer was wrong, or the mask lost; inf: none was found."""
        nearest = torch.full((len(self.images),), float("inf"))
        for owners, distances, agreed in self._trail:
            lost = agreed < least_right(self.wanted)
            nearest[owners[lost]] = torch.minimum(nearest[owners[lost]], distances[lost])
        return nearest


def square(
    inquiry: Inquiry, epsilon: float, *, chosen: Tensor | None = None, to_the_end: bool = False, seed: int = 0
) -> None:
    """Square in L-infinity, until each image's answer is wrong or its queries are spent.

    Args:
        inquiry: Where it asks.
        epsilon: Radius, in units of [0,1].
        chosen: (M,) indices of the images to attack; all when None.
        to_the_end: Go on where an answer is wrong already, to make it worse: for masks, of which some are worse.
        seed: The global generator of torch is left as it was.
    """
    owners = torch.arange(len(inquiry.images)) if chosen is None else chosen
    if not len(owners):
        return
    left = inquiry.limit - int(inquiry.asked[owners].max())
    attack = _Square(inquiry, epsilon, max(left - 1, 0), to_the_end)  # the random start is a query too
    _run(lambda: attack.attack_single_run(inquiry.images[owners], owners), seed)


def hop_skip_jump(
    inquiry: Inquiry, starts: Tensor, *, chosen: Tensor | None = None, batch: int = 32, seed: int = 0
) -> None:
    """HopSkipJump in L2: walks along the border between right and wrong answers towards each image.

    Args:
        inquiry: Where it asks.
        starts: (N,C,H,W) an image for each that is answered wrongly; where it is not, there is no attack.
        chosen: (M,) indices of the images to attack; all when None.
        batch: Images attacked together; the slowest of them sets the pace.
        seed: The global generator of torch is left as it was.
    """
    everyone = torch.arange(len(inquiry.images)) if chosen is None else chosen
    for owners in everyone.split(batch) if len(everyone) else ():
        _run(lambda owners=owners: _walk(inquiry, starts[owners], owners), seed)  # type: ignore[misc]


def _walk(inquiry: Inquiry, starts: Tensor, owners: Tensor) -> None:
    wrong = inquiry(starts, owners) <= 0
    if not wrong.any():
        return
    owners, starts = owners[wrong], starts[wrong]
    model = PyTorchModel(_Decision(inquiry, owners).eval(), bounds=BOUNDS, device=starts.device)
    criterion = Misclassification(torch.zeros(len(owners), dtype=torch.int64))
    attack = HopSkipJumpAttack(steps=inquiry.limit)
    try:
        attack.run(model, inquiry.images[owners], criterion, starting_points=starts)
    except (AssertionError, ValueError) as error:
        # foolbox asks again about what it found, and insists on the answer; one that is drawn at random may differ.
        if isinstance(error, ValueError) and "not adversarial" not in str(error):
            raise
        logger.info("an answer changed between two queries, which ended HopSkipJump; what it had found counts")


def _run(attack: Callable[[], object], seed: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(SpentError):
        torch.manual_seed(seed)
        attack()


class _Square(SquareAttack):  # type: ignore[misc]
    """pyautoattack's, with the numbers of the images where it has their labels: it does not say whom it asks about."""

    def __init__(self, inquiry: Inquiry, epsilon: float, queries: int, to_the_end: bool) -> None:
        super().__init__(None, eps=epsilon, n_queries=queries, device="cpu")
        self.init_hyperparam(inquiry.images)
        self._inquiry = inquiry
        self._offset = 1.0 if to_the_end else 0.0  # where no margin reaches 0, no image is done

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        margins = self._inquiry(x, y) + self._offset
        return margins, margins.clone()  # both are written to


class _Decision(nn.Module):
    """Whether answers hold: logits (N,2), larger at 0 where they do."""

    def __init__(self, inquiry: Inquiry, owners: Tensor) -> None:
        super().__init__()
        self._inquiry, self._owners = inquiry, owners

    def forward(self, images: Tensor) -> Any:
        margins = self._inquiry(images, self._owners)
        return torch.stack([margins, -margins], dim=1)
