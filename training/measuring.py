"""What the measuring verbs share: which images they look at, and what they know of a URL."""

import argparse
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from services.protocol.client import HTTPVictim
from training.cli import UserError, add_data_arguments, positive_int
from training.datasets import ImageSet, Splits

PATIENCE_S = 60.0
"""How long a measurement waits for a service that has gone away, in seconds."""


class Endpoint(Protocol):
    """The part of `HTTPVictim` that a measurement uses."""

    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) float32 probabilities."""

    def describe(self, image: Tensor) -> dict[str, object]:
        """One image (C,H,W) -> the JSON answer."""

    def ready(self) -> bool:
        """Whether something answers there and can serve."""


Connect = Callable[[str], AbstractContextManager[Endpoint]]
"""Makes the client of a URL."""


@dataclass(frozen=True)
class Identity:
    """What an endpoint says it is.

    Attributes:
        artifact: Id of the gateway's artifact; None for a bare victim.
        queries: Victim queries spent to learn it; 0 for a bare victim.
    """

    artifact: str | None
    queries: int


def connect(url: str) -> AbstractContextManager[Endpoint]:
    """A client of the service at `url`; it waits out short absences."""
    return HTTPVictim([url], patience_s=PATIENCE_S)


def identify(endpoint: Endpoint, url: str, image: Tensor, labels: Sequence[str]) -> Identity:
    """Asks an endpoint what it is, with one image.

    Args:
        endpoint: A client of the service at `url`.
        url: Its address, for messages.
        image: (C,H,W) float32 in [0,1].
        labels: The class names of the data, in order.

    Raises:
        UserError: Nothing is ready there, its classes are not the data's, or its answer has an unknown form.
    """
    if not endpoint.ready():
        raise UserError(f"nothing is ready at {url}: start the service, or name the right URL")
    answer = endpoint.describe(image)
    if answer.get("labels") != list(labels):
        raise UserError(
            f"{url} knows the classes {answer.get('labels')}, the data has {list(labels)}: use matching ones"
        )
    match answer.get("artifact"):
        case None:
            return Identity(artifact=None, queries=0)
        case {"id": str(name), "queries_spent": int(queries)}:
            return Identity(artifact=name, queries=queries)
        case unknown:
            raise UserError(f"{url} describes its artifact in an unknown form: {unknown}")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data and its kin, --split, --limit and --results."""
    add_data_arguments(parser)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to use (default test)")
    parser.add_argument(
        "--limit", type=positive_int, help="use at most LIMIT images, stratified by class (default all)"
    )
    parser.add_argument("--results", type=Path, default=Path("artifacts/results.json"), help="rows are added here")


def chosen_images(splits: Splits, split: str, limit: int | None, seed: int) -> tuple[list[int], ImageSet]:
    """The images that --split and --limit name.

    Returns:
        Their indices in the split, in `stratified_order`, and the images in that order.

    Raises:
        UserError: There are none.
    """
    pool = splits.validation if split == "validation" else splits.test
    if len(pool) == 0:
        raise UserError(f"the {split} split of {splits.name} has no images: choose another --split or --data")
    indices = stratified_order(pool.labels, limit, seed)
    return indices, pool.subset(indices)


def stratified_order(labels: Tensor, limit: int | None, seed: int) -> list[int]:
    """A deterministic order of images of which every beginning has about the classes' proportions.

    A smaller limit gives a beginning of what a larger one gives, so that work on few images can be continued.

    Args:
        labels: (N,) int64.
        limit: At most so many indices; all N when None.
        seed: Seed of the order within each class.

    Returns:
        Distinct indices into `labels`.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    placed = []
    for label, indices in members.items():
        random.Random(f"{seed}:{label}").shuffle(indices)
        placed += [((rank + 0.5) / len(indices), label, index) for rank, index in enumerate(indices)]
    return [index for *_, index in sorted(placed)[:limit]]


def defence_name(text: str) -> str:
    """Parses the name of a defence, which also names files (an argparse type)."""
    if not re.fullmatch(r"[\w+-][\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use letters, digits and . _ + -")
    return text


def number_list(text: str) -> list[float]:
    """Parses comma-separated finite numbers of at least 0 (an argparse type)."""
    values = [float(part) for part in text.split(",")]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected finite numbers of at least 0, got {text!r}")
    return list(dict.fromkeys(values))
