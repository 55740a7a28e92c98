"""A first look at a victim: whether it is reached, what it answers, how exactly and how fast, and what to do next."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from defense.errors import DefenseError, InvalidAnswer
from defense.noise_floor import ProbeReport, probe, probe_queries
from defense.victims import MeteredVictim, QueryLedger
from services.protocol.client import Endpoint
from services.protocol.errors import (
    InvalidInput,
    NotFound,
    ServiceError,
    TooLarge,
    UnsupportedMedia,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from training.victim.function import FunctionVictim

IMAGES: Final = 8
"""Images that are asked about."""

_SINGLES = 3  # requests of one image each, by which the latency is told
_NOISE = 0.05  # on the images from which steps are taken: about what a denoiser leaves
_SAME = 1e-6

QUERIES: Final = 2 + _SINGLES + IMAGES + probe_queries(IMAGES)
"""What that costs: the images, their neighbours, and repetitions."""

_HINTS: Final[dict[type[ServiceError], str]] = {
    UpstreamUnreachable: "see that the service runs, and that host and port of --victim-url are its own",
    UpstreamTimeout: "it accepts connections and does not answer: look at its log",
    NotFound: "there is nothing at this path: --victim-url takes http://HOST:PORT, http://HOST:PORT/v2/models/NAME, or "
    "the URL that a --victim-mapping describes",
    UnsupportedMedia: "it does not take float32 tensors: try --wire image, or a --victim-mapping (docs/victims.md)",
    TooLarge: "lower --batch-images or --size",
    InvalidInput: "it refuses these images: try --size, --channels or --wire image, or a --victim-mapping "
    "(docs/victims.md)",
    UpstreamInvalid: "a --victim-mapping says where in its answer the scores are (docs/victims.md)",
}


@dataclass(frozen=True)
class VictimCheck:
    """What was found out about a victim that answers.

    Attributes:
        labels: Names of its classes; None: it does not name them.
        positions: () of a classifier; (H, W) of a segmenter.
        report: Of the probe: kind of scores, rounding, noise floor, steps.
        constant: Whether all images got the same answer.
        one_s: Median seconds of a request with one image.
        batch_s: Seconds of a request with `IMAGES` images.
        queries: Spent, in images.
    """

    labels: list[str] | None
    positions: tuple[int, ...]
    report: ProbeReport
    constant: bool
    one_s: float
    batch_s: float
    queries: int

    @property
    def preset(self) -> str:
        """The method that we recommend for such a victim."""
        return "surrogate-dense" if self.positions else "surrogate"

    @property
    def is_usable(self) -> bool:
        """Whether a defense can be learned from such answers."""
        return not self.constant

    def lines(self) -> list[str]:
        """The findings, for people."""
        report, names = self.report, "not named" if self.labels is None else ", ".join(self.labels)
        scores = "labels only (or it is sure of all of these images)" if report.label_only else str(report.kind)
        if report.rounding is not None and not report.label_only:
            scores += f", rounded to {report.rounding:g}"
        answers = f"a mask of {self.positions[0]} x {self.positions[1]}" if self.positions else "a class an image"
        gain = self.one_s * IMAGES / self.batch_s
        found = [
            f"classes: {report.num_classes} ({names}); {answers}",
            f"scores: {scores}; noise floor {report.noise:.1e} nats",
            f"speed: {1000 * self.one_s:.0f} ms for one image, {1000 * self.batch_s:.0f} ms for {IMAGES} in a batch "
            f"({gain:.1f} times as fast an image)",
        ]
        if self.constant:
            found.append(
                "PROBLEM: all images got the same answer: see --size, --channels and what the mapping points to, and "
                "give --data images of the kind that the model knows"
            )
        elif report.label_only:
            found.append(
                "differences: none can be taken of labels; --votes makes scores of them, at many queries an image"
            )
        elif report.is_resolved:
            found.append(f"differences: a step of {report.mu:.3g} stands clear of the noise; every method can be used")
        else:
            found.append("differences: no step stands clear of the noise; use a method with a surrogate")
        return found


def check_victim(victim: Endpoint | Callable[[Tensor], Tensor], images: Tensor) -> VictimCheck:
    """Examines a victim with some hundred queries (`QUERIES` for 8 images).

    Args:
        victim: The black box, such as `HTTPVictim`, or a function of images.
        images: (N,C,H,W) float32 in [0,1], N of at least 2, of the kind it knows; the first `IMAGES` are used.

    Raises:
        ServiceError: It cannot be reached, or refuses; `hint` says what may help.
        DefenseError: Its answers are not scores.
    """
    victim, images = victim if isinstance(victim, Endpoint) else FunctionVictim(victim), images[:IMAGES]
    ledger = QueryLedger()
    metered = MeteredVictim(victim, ledger)
    metered.query(images[:1], "probe")  # the first request opens the connection
    one_s = sorted(_seconds(lambda: metered.query(images[:1], "probe")) for _ in range(_SINGLES))[_SINGLES // 2]
    answers: list[Tensor] = []
    batch_s = _seconds(lambda: answers.append(metered.query(images, "probe")))
    generator = torch.Generator().manual_seed(0)
    points = images + _NOISE * torch.randn(images.shape, generator=generator)
    report = probe(metered, images, points, lambda z: z.clamp(0, 1), generator)
    ledger.charge("probe", 1)
    labels: object = None
    with suppress(ServiceError):  # one that speaks tensors only has no place for names
        labels = victim.describe(images[0]).get("labels")
    named = isinstance(labels, list) and len(labels) == report.num_classes
    scores = answers[0]
    return VictimCheck(
        labels=[str(name) for name in labels] if isinstance(labels, list) and named else None,
        positions=tuple(scores.shape[2:]),
        report=report,
        constant=bool((scores - scores[:1]).abs().max() < _SAME),
        one_s=one_s,
        batch_s=batch_s,
        queries=ledger.total,
    )


def hint(error: ServiceError | DefenseError) -> str:
    """What may help against an error of `check_victim`."""
    told = str(error)
    if " answered 401" in told or " answered 403" in told:
        return "it wants a key: put its header into a --victim-mapping (docs/victims.md)"
    if isinstance(error, InvalidAnswer):
        return "what it answers is not one score a class: point a --victim-mapping to the scores (docs/victims.md)"
    return next((text for kind, text in _HINTS.items() if isinstance(error, kind)), "see docs/victims.md")


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
