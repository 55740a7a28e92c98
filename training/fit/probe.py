"""The probe of a victim: what it answers, how exactly, and how it names its classes."""

import logging
from typing import Any

import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.noise_floor import ProbeReport, probe
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim
from services.protocol.client import Endpoint
from services.protocol.errors import TRANSIENT, ServiceError
from training.command.errors import UserError
from training.fit.config import FitConfig

logger = logging.getLogger(__name__)


def probe_victim(
    victim: MeteredVictim, client: Endpoint, sanitizer: Sanitizer, images: Tensor, config: FitConfig
) -> tuple[list[str], ProbeReport]:
    """Probes a victim before anything is spent on training, with training's steps at the border, from noisy images.

    Args:
        victim: Gets its number of classes, and kind and rounding of scores, set here.
        client: The same victim, unmetered; its one query is charged to the ledger of `victim`.
        sanitizer: What will be trained.
        images: (N, C, H, W) in [0, 1], N of at least 2; costs `probe_queries(N)` queries and one more.
        config: Of the run.

    Returns:
        The names of the classes in the order of the scores (numbers if the victim does not name them), and the report.

    Raises:
        BudgetExhausted: The budget does not hold the probe.
        DefenseError: No step is resolved, or the victim answers labels only.
        InvalidAnswer: The answers are not scores, or the names do not fit them.
        ServiceError: The victim is unavailable.
    """
    if not client.ready():
        logger.info("the victim does not say that it is ready; asking it all the same, and waiting for it")
    generator = torch.Generator().manual_seed(config.seed)
    noisy = images + config.sigma * torch.randn(images.shape, generator=generator)
    device = next(sanitizer.parameters()).device
    with torch.no_grad():
        points = sanitizer.eval().encode(noisy.to(device))
        report = probe(
            victim,
            images.to(device),
            points,
            sanitizer.decode,
            generator,
            difference=config.slopes,
            mu=None if config.mu == "auto" else config.mu,
            needs_differences=config.needs_differences,
        )
    report.require_step()
    unclear = report.spacings and not report.is_resolved
    logger.log(logging.WARNING if unclear else logging.INFO, "victim: %s", report.describe())
    return _ask_labels(victim, client, images[0]), report


def recall_victim(victim: MeteredVictim, client: Endpoint, state: dict[str, Any], image: Tensor) -> None:
    """Restores what an interrupted run had probed from its checkpoint's `state`, and checks the classes with one query.

    Nothing is asked if the budget is spent. Raises UserError if the victim names other classes now, else as
    `probe_victim`.
    """
    labels = state["labels"]
    victim.kind, victim.rounding, victim.num_classes = state["kind"], state["rounding"], len(labels)
    victim.positions = tuple(state["positions"])
    remaining = victim.ledger.remaining
    if (remaining is None or remaining > 0) and _ask_labels(victim, client, image) != labels:
        raise UserError("the victim has other classes than when the run began: is it another model?")


def _ask_labels(victim: MeteredVictim, client: Endpoint, image: Tensor) -> list[str]:
    """The victim's names of its classes; numbers if it speaks tensors only."""
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
