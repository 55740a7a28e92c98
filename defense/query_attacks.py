"""Attacks that see nothing but answers.

`square` reads the scores (Andriushchenko et al., ECCV 2020; L-infinity; pyautoattack's), `hop_skip_jump` the decisions
alone (Chen et al., S&P 2020; L2, minimum-norm). Both ask through an `Inquiry`, where what they gained is read.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import torch
from pyautoattack.square import SquareAttack
from torch import Tensor

from defense.attacks import LOST, least_right
from defense.gradient_attacks import l2_norms
from defense.objectives import agreement

Scores = Callable[[Tensor], Tensor]
"""(N,C,H,W) in [0,1] -> probabilities (N,K) or (N,K,H,W); may raise `SpentError`."""

_TIES: Final = 1e-3
"""Weight of a mask's probabilities beside its Dice: between equal masks they show an attack which way to go."""

_HALVINGS: Final = 24  # float32 has no finer steps
_TINY: Final = 1e-12  # no division by zero


class SpentError(Exception):
    """There are no more answers to be had."""


class Inquiry:
    """Questions about the same N images over and over, and what came of them; `asked` (N,) counts each one's queries.

    `images` (N,C,H,W) float32 in [0,1] are the originals; `wanted` the classes (N,) or masks (N,H,W) that the answers
    are to be brought away from; `limit` is the most queries for each image.
    """

    def __init__(self, scores: Scores, images: Tensor, wanted: Tensor, limit: int) -> None:
        self.images, self.wanted, self.limit = images, wanted, limit
        self.asked = torch.zeros(len(images), dtype=torch.int64)
        self._scores = scores
        self._trail: list[tuple[Tensor, Tensor, Tensor]] = []  # owners, L2 distances, agreements

    def __call__(self, images: Tensor, owners: Tensor) -> Tensor:
        """Asks about changed images (M,C,H,W), each of another original, whose indices are `owners` (M,).

        Returned are (M,) margins, above 0 while the answer holds: of a class its probability less the largest other
        one; of a mask its Dice less `LOST`, up to what its probabilities add to break ties.

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
    """Square in L-infinity, radius `epsilon` in [0,1], until each image's answer is wrong or its queries are spent.

    `chosen` (M,) are the indices of the images to attack, None: all. `to_the_end` goes on where an answer is wrong
    already, to make it worse: for masks. The global generator of torch is left as it was.
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

    `starts` (N,C,H,W) holds for each an image that is answered wrongly; where it is not, there is no attack. Other
    arguments as of `square`; `batch` images are attacked together.
    """
    everyone = torch.arange(len(inquiry.images)) if chosen is None else chosen
    for owners in everyone.split(batch) if len(everyone) else ():
        _run(lambda owners=owners: _walk(inquiry, starts[owners], owners), seed)  # type: ignore[misc]


def _walk(inquiry: Inquiry, x_t: Tensor, owners: Tensor) -> None:
    """Moves wrongly answered images towards the originals until their queries are spent; the paper's symbols."""
    x = inquiry.images[owners]
    dimensions = x[0].numel()
    halvings = min(math.ceil(1.5 * math.log2(dimensions)), _HALVINGS)  # to theta = d^(-3/2)

    def wrong(images: Tensor, asked: Tensor) -> Tensor:
        """(M,) phi: whether answers are wrong; asks about the chosen images that have queries left."""
        asked = asked & (inquiry.asked[owners] < inquiry.limit)
        answers = torch.zeros(len(owners), dtype=torch.bool)
        if asked.any():
            answers[asked] = inquiry(images[asked], owners[asked]) <= 0
        return answers

    def to_border(images: Tensor, asked: Tensor) -> Tensor:
        """Searches the line from the originals for the nearest wrong answer."""
        low, high = torch.zeros(len(owners)), torch.ones(len(owners))
        for _ in range(halvings):
            middle = (low + high) / 2
            found = wrong(torch.lerp(x, images, _wide(middle)), asked)
            low, high = torch.where(found, low, middle), torch.where(found, middle, high)
        return torch.lerp(x, images, _wide(high))

    everyone = torch.ones(len(owners), dtype=torch.bool)
    alive = wrong(x_t, everyone)
    x_t = to_border(x_t, alive)
    t = 0
    while (alive := alive & (inquiry.asked[owners] < inquiry.limit)).any():
        t += 1
        distance = torch.linalg.vector_norm((x_t - x).flatten(1), dim=1)
        delta = torch.full_like(distance, 0.1) if t == 1 else (distance / dimensions).clamp_min(_TINY)
        direction = _direction(x_t, delta, int(100 * t**0.5), lambda images: wrong(images, alive))
        step, searching = distance / t**0.5, alive
        while searching.any():
            moved = (x_t + _wide(step) * direction).clamp(0, 1)
            searching = searching & ~wrong(moved, searching) & (inquiry.asked[owners] < inquiry.limit)
            step = torch.where(searching, step / 2, step)
        x_t = torch.where(_wide(alive), to_border(moved, alive), x_t)


def _direction(x_t: Tensor, delta: Tensor, count: int, wrong: Callable[[Tensor], Tensor]) -> Tensor:
    """The Monte Carlo estimate of the border's normal at x_t, of unit length, (M,C,H,W).

    The mean of (phi_b - mean phi) u_b over `count` random directions u_b, phi_b = 1 if x_t + delta u_b is answered
    wrongly, else -1; of phi_b u_b where all are alike.
    """
    total, weighted, right = torch.zeros_like(x_t), torch.zeros_like(x_t), torch.zeros(len(x_t))
    for _ in range(count):
        u = torch.randn_like(x_t)
        shown = (x_t + _wide(delta) * u / l2_norms(u)).clamp(0, 1)
        phi = torch.where(wrong(shown), 1.0, -1.0)
        u_b = (shown - x_t) / _wide(delta)  # what clipping left of it
        total, weighted, right = total + u_b, weighted + _wide(phi) * u_b, right + phi
    mean = _wide(right / count)
    estimate = torch.where(mean.abs() == 1, weighted, weighted - mean * total)
    direction: Tensor = estimate / l2_norms(estimate).clamp_min(_TINY)
    return direction


def _wide(values: Tensor) -> Tensor:
    """(M,) to (M,1,1,1)."""
    return values.view(-1, 1, 1, 1)


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
