"""What the measuring verbs share: which images they look at, and what they know of a URL."""

import argparse
import fcntl
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from defense.files import replace_file
from services.protocol.client import HTTPVictim
from training.command.cli import add_data_arguments, positive_int
from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits
from training.measure.segmentation import small_lesions

PATIENCE_S = 60.0
"""How long a measurement waits for a service that has gone away, in seconds."""

CHUNK = 128
"""Images that a model in this process takes at once: the activations of more leave the cache."""


class Endpoint(Protocol):
    """The part of `HTTPVictim` that a measurement uses."""

    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 probabilities."""

    def describe(self, image: Tensor) -> dict[str, object]:
        """One image (C,H,W) -> the JSON answer."""

    def ready(self) -> bool:
        """Whether something answers there and can serve."""


class Defended:
    """An endpoint behind something that its images pass through first, in this process, as they do in a gateway.

    Args:
        front: (N,C,H,W) finite images of any range to images of the same shape.
        victim: Where they go then.
        device: Where `front` runs.
    """

    def __init__(self, front: Callable[[Tensor], Tensor], victim: Endpoint, device: torch.device) -> None:
        self._front, self._victim, self._device = front, victim, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N,C,H,W) float32 -> (N,K) or (N,K,H,W) float32 probabilities, on the device of the images."""
        passed = [self._front(part.to(self._device, memory_format=torch.channels_last)) for part in images.split(CHUNK)]
        return self._victim(torch.cat(passed)).to(images.device)


Connect = Callable[[str], AbstractContextManager[Endpoint]]
"""Makes the client of a URL."""


@dataclass(frozen=True)
class Identity:
    """What an endpoint says it is.

    Attributes:
        artifact: Id of the gateway's artifact; None for a bare victim.
        queries: Victim queries spent to learn it; 0 for a bare victim.
        name: The artifact's, where it says so.
    """

    artifact: str | None
    queries: int
    name: str | None = None


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
            f"{url} knows the classes {answer.get('labels')}, the data has {list(labels)}: use matching ones "
            "(a --victim-mapping with `labels` names those of a victim that does not)"
        )
    match answer.get("artifact"):
        case None:
            return Identity(artifact=None, queries=0)
        case {"id": str(artifact), "queries_spent": int(queries), "name": str(name)}:
            return Identity(artifact, queries, name)
        case {"id": str(artifact), "queries_spent": int(queries)}:
            return Identity(artifact, queries)
        case unknown:
            raise UserError(f"{url} describes its artifact in an unknown form: {unknown}")


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data and its kin, --split, --limit and --results."""
    add_data_arguments(parser)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to use (default test)")
    parser.add_argument(
        "--limit", type=positive_int, help="use at most LIMIT images, stratified by class or lesion size (default all)"
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
    indices = stratified_order(pool.labels if pool.labels.ndim == 1 else small_lesions(pool.labels).long(), limit, seed)
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


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock that other processes respect, and that ends with this one, however it ends.

    Args:
        path: The lock's file; made, and left behind.
        wait: Whether to wait for it.

    Yields:
        Whether it is held; always, with `wait`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def claim(path: Path, settings: dict[str, JsonValue]) -> None:
    """Notes in a file with which settings the results beside it are made, and refuses to mix them with others.

    Settings that are None now, or were, are not compared. "images" may grow: what is there is continued.

    Raises:
        UserError: The results beside it were made with other settings; they are left as they are.
    """
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        old = json.loads(path.read_bytes()) if path.exists() else {}
        merged = {**old, **{name: value for name, value in settings.items() if value is not None}}
        changes = [
            f"{name} was {old[name]}, is {value}"
            for name, value in merged.items()
            if old.get(name, value) != value and not (name == "images" and value > old[name])
        ]
        if changes:
            raise UserError(f"{path.parent} was made otherwise ({'; '.join(changes)}): use the same, or another --out")
        replace_file(path, (json.dumps(merged, indent=1) + "\n").encode())


def defense_name(text: str) -> str:
    """Parses the name of a defense, which also names files (an argparse type)."""
    if not re.fullmatch(r"[\w+-][\w.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: use letters, digits and . _ + -")
    return text


def number_list(text: str) -> list[float]:
    """Parses comma-separated finite numbers of at least 0 (an argparse type)."""
    values = [float(part) for part in text.split(",")]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected finite numbers of at least 0, got {text!r}")
    return list(dict.fromkeys(values))
