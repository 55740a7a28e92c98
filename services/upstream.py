"""Whom a service asks about its batches, and who pays for it."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.protocol.errors import TRANSIENT, CircuitOpen, DeadlineExceeded

Array = npt.NDArray[np.float32]

NO_IMAGES_FAULT: Final = (*TRANSIENT, CircuitOpen, DeadlineExceeded)
"""Failures of an upstream that say nothing about the images: nobody is asked about again."""


class Payer(Protocol):
    """Is told how many images the upstream is asked about on a request's account."""

    def spend(self, queries: int, /) -> None:
        """Counts images that are about to be sent."""

    def refund(self, queries: int, /) -> None:
        """Takes back images that were not sent after all."""


class _Nobody:
    """Pays for nothing, where no accounts are kept."""

    def spend(self, queries: int, /) -> None:
        """Is not counted."""

    def refund(self, queries: int, /) -> None:
        """Is not counted."""


NOBODY: Final = _Nobody()


@dataclass(frozen=True)
class Prepaid:
    """Pays for images that were counted before they began to wait."""

    refund: Callable[[int], None]

    def spend(self, queries: int, /) -> None:
        """Is counted already."""


@dataclass(frozen=True)
class Share:
    """One request's part of a batch that is sent upstream: who pays, and how many of its images, in order."""

    payer: Payer
    images: int


@dataclass(frozen=True)
class Upstream:
    """Who is asked about computed batches.

    Attributes:
        ask: maps a batch (n,...) to n rows, given the requests' shares and whether it is a retry of refused images.
        width: how many batches may be under way, at least 1; asked before each.
        together: whether a batch may mix the images of several requests.
    """

    ask: Callable[[Array, Sequence[Share], bool], Awaitable[Array]]
    width: Callable[[], int]
    together: bool = True
