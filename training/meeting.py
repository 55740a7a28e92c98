"""The first words with a victim: what it answers, how exactly, and how it names its classes."""

import logging

import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.objectives import ScoreKind
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim, probe
from services.protocol.errors import TRANSIENT, ServiceError
from training.cli import UserError
from training.measuring import Endpoint

logger = logging.getLogger(__name__)


def meet(
    victim: MeteredVictim,
    client: Endpoint,
    sanitizer: Sanitizer,
    images: Tensor,
    sigma: float,
    mu: float,
    seed: int,
) -> list[str]:
    """Probes a victim before anything is spent on training, and logs what was found.

    The probe's steps are those of training: of length mu at the border of the black box, from noisy images.

    Args:
        victim: The metered black box; its number of classes and kind of scores are fixed here.
        client: The same black box, unmetered; its one query here is charged to the ledger of `victim`.
        sanitizer: What will be trained.
        images: (N, C, H, W) in [0, 1], N of at least 2; 4 N + 1 queries.
        sigma: Standard deviation of the noise.
        mu: The step of the finite differences, in L2 norm.
        seed: Of noise and directions.

    Returns:
        The victim's names of its classes, in the order of its scores; numbers where it refuses to name them.

    Raises:
        BudgetExhausted: The budget does not hold the probe.
        InvalidAnswer: The answers are no scores, or the names do not fit them.
        ServiceError: The victim stayed away.
    """
    if not client.ready():
        logger.info("the victim does not say that it is ready; asking it all the same, and waiting for it")
    generator = torch.Generator().manual_seed(seed)
    noisy = images + sigma * torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        points = sanitizer.eval().encode(noisy.to(next(sanitizer.parameters()).device))
        direction = torch.randn(points.shape, generator=generator).flatten(1)
        step = (mu * direction / direction.norm(dim=1, keepdim=True)).view(points.shape).to(points.device)
        report = probe(victim, sanitizer.decode(points), sanitizer.decode(points + step), mu)
    logger.info("victim: %s", report.describe())
    return _ask_labels(victim, client, images[0])


def meet_again(victim: MeteredVictim, client: Endpoint, labels: list[str], kind: ScoreKind, image: Tensor) -> None:
    """Goes on with a victim that an interrupted run has probed; one query, none where the budget is spent.

    Args:
        victim: The metered black box; gets its number of classes and kind of scores from the earlier run.
        client: The same black box, unmetered.
        labels: What the victim called its classes.
        kind: What its scores were.
        image: (C, H, W) in [0, 1], to ask with.

    Raises:
        UserError: It names other classes now.
        InvalidAnswer: The names do not fit its scores.
        ServiceError: The victim stayed away.
    """
    victim.kind, victim.num_classes = kind, len(labels)
    remaining = victim.ledger.remaining
    if (remaining is None or remaining > 0) and _ask_labels(victim, client, image) != labels:
        raise UserError("the victim has other classes than when the run began: is it another model?")


def _ask_labels(victim: MeteredVictim, client: Endpoint, image: Tensor) -> list[str]:
    """The victim's names of its classes; numbers, where it speaks tensors only and so has no place for names."""
    assert victim.num_classes is not None  # probed
    victim.ledger.charge("probe", 1)
    try:
        labels = client.describe(image).get("labels")
    except TRANSIENT:
        raise
    except ServiceError as error:
        logger.info("the victim does not name its classes, so they are numbered: %s", error)
        return [str(index) for index in range(victim.num_classes)]
    if not isinstance(labels, list) or len(labels) != victim.num_classes or not all(isinstance(x, str) for x in labels):
        raise InvalidAnswer(f"the victim answers {victim.num_classes} scores, but names its classes {labels!r}")
    logger.info("the victim's classes: %s", ", ".join(labels))
    return labels
