"""Counts the victim's votes on sanitized noisy copies of an image.

The noise is Gaussian and, as the certificate requires, not clipped. Its generator is seeded for every request with 128
bits of the operating system's entropy, so that nobody can choose or predict it.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import anyio.to_thread
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defense.errors import InvalidAnswer
from defense.smoothing import count_votes
from services.gateway.accounting import Bill
from services.gateway.modes import Plan
from services.protocol.errors import UpstreamInvalid
from services.upstream import Array

CHUNKS_AT_ONCE = 4
"""How many chunks of noisy copies are in work at once, over all requests."""


class Voter:
    """Counts votes in chunks, which bound memory and the time that others wait; requests take turns, chunk by chunk.

    Args:
        ask: the victim's scores (N,K) or (N,K,H,W) for images (N,C,H,W), once sanitized.
        chunk: most copies in one call of it.
    """

    def __init__(self, ask: Callable[[Array, Bill], Awaitable[Array]], *, chunk: int) -> None:
        self._ask = ask
        self._chunk = chunk
        self._turns = asyncio.Semaphore(CHUNKS_AT_ONCE)

    async def __call__(self, images: Array, plan: Plan, bill: Bill) -> tuple[Tensor, ...]:
        """The votes on images (N,C,H,W): for each number in `plan.copies`, (N,K) or (N,K,H,W) int64 counts.

        Raises:
            ServiceError: the victim failed, or its answers cannot be counted.
        """
        noise = np.random.default_rng(secrets.randbits(128))
        kinds = len(plan.copies)
        # Of each copy, the box that it votes in: boxes are counted through by image and, within it, by kind.
        boxes = np.repeat(np.arange(len(images) * kinds), np.tile(plan.copies, len(images)))
        counts: Tensor | None = None
        for start in range(0, len(boxes), self._chunk):
            part = boxes[start : start + self._chunk]
            async with self._turns:
                copies = await anyio.to_thread.run_sync(_noisy, images, part // kinds, plan.sigma, noise)
                scores = await self._ask(copies, bill)
                counted = await anyio.to_thread.run_sync(_counted, scores, part)
            if counts is None:
                counts = torch.zeros((len(images) * kinds, *counted.shape[1:]), dtype=torch.int64)
            if counts.shape[1:] != counted.shape[1:]:
                raise UpstreamInvalid("the model behind the gateway gave no valid answer")
            counts[part[0] : part[-1] + 1] += counted
        assert counts is not None  # there is at least one copy
        by_image: Tensor = counts.unflatten(0, (len(images), kinds))
        return tuple(by_image[:, kind] for kind in range(kinds))


def _noisy(images: Array, which: npt.NDArray[np.int64], sigma: float, noise: np.random.Generator) -> Array:
    """One noisy copy of each image (C,H,W) in `which`."""
    copies = noise.standard_normal((len(which), *images.shape[1:]), dtype=np.float32)
    copies *= np.float32(sigma)
    copies += images[which]
    return copies


def _counted(scores: Array, boxes: npt.NDArray[np.int64]) -> Tensor:
    """The votes of scores (n,K) or (n,K,H,W) for each distinct box in `boxes`, which ascends."""
    tensor = torch.from_numpy(scores)
    try:
        return torch.stack([count_votes(one) for one in tensor.split(np.unique(boxes, return_counts=True)[1].tolist())])
    except InvalidAnswer as error:
        raise UpstreamInvalid(
            "the model behind the gateway answers one score an image, and there is no voting on one class"
        ) from error
