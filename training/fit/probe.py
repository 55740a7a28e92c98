"""The first words with a victim: what it answers, how exactly, and how it names its classes."""

import argparse
import logging
from pathlib import Path
from typing import TypedDict, get_args

import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.estimators import Difference
from defense.noise_floor import ProbeReport, probe
from defense.objectives import ScoreKind
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim
from services.protocol.client import WireName
from services.protocol.errors import TRANSIENT, ServiceError
from services.protocol.mapping import Mapping, load_mapping
from training.command.cli import non_negative_float, positive_int
from training.command.errors import UserError
from training.measure.endpoints import Endpoint

logger = logging.getLogger(__name__)


class AnswerOptions(TypedDict):
    """Arguments of `HTTPVictim`."""

    wire: WireName
    mapping: Mapping | None


def add_answer_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds --victim-mapping, --wire, --votes and --vote-noise: for victims that are asked, or answer, in other ways."""
    parser.add_argument(
        "--victim-mapping",
        type=Path,
        help="TOML or JSON file that says what the URL does not: headers, labels, how an image is sent and where the "
        "scores are in the answer (services/protocol/mapping.py)",
    )
    parser.add_argument(
        "--wire",
        choices=get_args(WireName),
        default="tensor",
        help="tensor: float32, many images a request, the default; image: one 8-bit PNG a request, for a victim that "
        "knows only images",
    )
    parser.add_argument(
        "--votes",
        type=positive_int,
        default=1,
        help="for a victim that answers labels only: the label's shares among so many noisy copies, at as many queries "
        "(default 1: its answer itself)",
    )
    parser.add_argument(
        "--vote-noise", type=non_negative_float, default=0.1, help="standard deviation of theirs (default 0.1)"
    )


def answer_options(arguments: argparse.Namespace) -> AnswerOptions:
    """What --victim-mapping and --wire mean to the victim's client.

    Raises:
        InvalidInput: The mapping is none.
    """
    return {"wire": arguments.wire, "mapping": load_mapping(arguments.victim_mapping)}


def meet(
    victim: MeteredVictim,
    client: Endpoint,
    sanitizer: Sanitizer,
    images: Tensor,
    sigma: float,
    seed: int,
    *,
    difference: Difference = "forward",
    mu: float | None = None,
    needs_differences: bool = True,
) -> tuple[list[str], ProbeReport]:
    """Probes a victim before anything is spent on training, and logs what was found.

    The probe's steps are those of training: at the border of the black box, from noisy images.

    Args:
        victim: The metered black box; its number of classes, and kind and rounding of scores, are fixed here.
        client: The same black box, unmetered; its one query here is charged to the ledger of `victim`.
        sanitizer: What will be trained.
        images: (N, C, H, W) in [0, 1], N of at least 2; `probe_queries(N)` queries and one more.
        sigma: Standard deviation of the noise.
        seed: Of noise and directions.
        difference: How the estimator takes slopes.
        mu: Their step, in L2 norm; None: the probe chooses it.
        needs_differences: Whether the method takes finite differences at all; without, none are probed and no victim is
            refused for its noise.

    Returns:
        The victim's names of its classes, in the order of its scores; numbers where it refuses to name them. And what
        the probe found, the step among it.

    Raises:
        BudgetExhausted: The budget does not hold the probe.
        DefenseError: No step is resolved, or the victim answers labels only; with what was measured.
        InvalidAnswer: The answers are no scores, or the names do not fit them.
        ServiceError: The victim stayed away.
    """
    if not client.ready():
        logger.info("the victim does not say that it is ready; asking it all the same, and waiting for it")
    generator = torch.Generator().manual_seed(seed)
    noisy = images + sigma * torch.randn(images.shape, generator=generator)
    device = next(sanitizer.parameters()).device
    with torch.no_grad():
        points = sanitizer.eval().encode(noisy.to(device))
        report = probe(
            victim,
            images.to(device),
            points,
            sanitizer.decode,
            generator,
            difference=difference,
            mu=mu,
            needs_differences=needs_differences,
        )
    report.require_step()
    unclear = report.spacings and not report.is_resolved
    logger.log(logging.WARNING if unclear else logging.INFO, "victim: %s", report.describe())
    return _ask_labels(victim, client, images[0]), report


def meet_again(
    victim: MeteredVictim,
    client: Endpoint,
    labels: list[str],
    kind: ScoreKind,
    rounding: float | None,
    positions: tuple[int, ...],
    image: Tensor,
) -> None:
    """Goes on with a victim that an interrupted run has probed; one query, none where the budget is spent.

    Args:
        victim: The metered black box; gets what the earlier run knows of its answers.
        client: The same black box, unmetered.
        labels: What the victim called its classes.
        kind: What its scores were.
        rounding: To which decimal unit they were rounded; None: to none.
        positions: Their axes behind the classes.
        image: (C, H, W) in [0, 1], to ask with.

    Raises:
        UserError: It names other classes now.
        InvalidAnswer: The names do not fit its scores.
        ServiceError: The victim stayed away.
    """
    victim.kind, victim.rounding, victim.num_classes, victim.positions = kind, rounding, len(labels), positions
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
