"""Perceptual fingerprints, and how many different near images a client has sent, in bounded memory.

Black-box attacks (score-based: Andriushchenko et al. 2020, Square; decision-based: Chen et al. 2020, HopSkipJump) need
hundreds of almost equal images. Stateful defenses (Chen et al. 2020, "Stateful Detection of Black-Box Adversarial
Attacks"; Li et al. 2022, Blacklight) keep queries and look for neighbours. Here, neighbours are counted by group, which
bounds memory, and exact repetitions are not counted: they teach an attacker nothing, and honest clients repeat images.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from services.upstream import Array

GROUPS: Final = 256
"""Groups of images that are remembered of one client; the one not met for longest gives way."""

REPEATS: Final = 512
"""Images of one client that are known again to the last bit."""

SIDE: Final = 16
"""A fingerprint is the image in grey, SIDE x SIDE pixels, each the mean of what it covers."""

Fingerprints = npt.NDArray[np.float32]
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Meeting:
    """What came of an image.

    Attributes:
        near: different images in its group in this window, this one included.
        is_new: whether it was not sent before, bit for bit.
        ends_in_s: seconds until the group's count starts anew.
    """

    near: int
    is_new: bool
    ends_in_s: float


def fingerprints(images: Array) -> Fingerprints:
    """The fingerprints (N, SIDE * SIDE) in [0,1] of images (N,C,H,W), whose values are clipped to [0,1].

    Block means keep visible content and lose most pixel noise. Brightness is kept: to ordinary clients too, images that
    differ only by it are different.
    """
    # Products with narrow matrices, not PyTorch's pooling: its threads would take the sanitizer's cores.
    grey = images.clip(0, 1).mean(axis=1)
    small: Fingerprints = _pooling(images.shape[2]) @ grey @ _pooling(images.shape[3]).T
    return small.reshape(len(images), SIDE * SIDE)


@lru_cache(maxsize=64)
def _pooling(size: int) -> npt.NDArray[np.float32]:
    """(SIDE, size): row i averages the pixels, at least one, that pixel i of SIDE covers."""
    matrix = np.zeros((SIDE, size), np.float32)
    for place in range(SIDE):
        begin, end = place * size // SIDE, -(-(place + 1) * size // SIDE)
        matrix[place, begin:end] = 1 / (end - begin)
    return matrix


def digests(images: Array) -> Digests:
    """Hashes (N,) that tell images (N,C,H,W) apart bit for bit."""
    hashes = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.array([int.from_bytes(one) for one in hashes], np.uint64)


class History:
    """One client's images, as groups of near ones. Not thread-safe.

    Args:
        radius: maximum distance from a group's first image, as `fingerprints` measures.
        window_s: seconds after which a group's count starts anew.
    """

    def __init__(self, radius: float, window_s: float) -> None:
        self._radius = radius
        self._window_s = window_s
        self._prints = np.zeros((GROUPS, SIDE * SIDE), np.uint8)  # in steps of 1/255
        self._squares = np.zeros(GROUPS)  # of the prints' norms
        self._counts = np.zeros(GROUPS, np.int64)
        self._since = np.zeros(GROUPS)
        self._met = np.full(GROUPS, -np.inf)
        self._repeats = np.zeros(REPEATS, np.uint64)
        self._next_repeat = 0

    def meet(self, fingerprint: Fingerprints, digest: np.uint64, now: float) -> Meeting:
        """Records an image by its fingerprint and digest at `now`, in seconds."""
        group = self._group(np.round(fingerprint * 255), now)
        is_new = not (self._repeats == digest).any()
        if is_new:
            self._repeats[self._next_repeat] = digest
            self._next_repeat = (self._next_repeat + 1) % REPEATS
            self._counts[group] += 1
        return Meeting(int(self._counts[group]), is_new, float(self._since[group]) + self._window_s - now)

    def _group(self, coarse: Fingerprints, now: float) -> int:
        """The group of a fingerprint in steps of 1/255, made if need be."""
        known = self._met > -np.inf
        # |p - c|^2 = |p|^2 - 2 p.c + |c|^2. Exact: a product of two prints is a whole number below 2^24.
        square = float(coarse @ coarse)
        products = (self._prints.astype(np.float32) @ coarse).astype(np.float64)
        distances = np.where(known, self._squares - 2 * products + square, np.inf)
        group = int(distances.argmin())
        is_new = distances[group] > (self._radius * 255) ** 2 * SIDE**2
        if is_new:
            group = int(self._met.argmin())
            self._prints[group] = coarse
            self._squares[group] = square
        if is_new or now >= self._since[group] + self._window_s:
            self._counts[group] = 0
            self._since[group] = now
        self._met[group] = now
        return group
