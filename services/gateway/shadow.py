"""Shadow queries: the raw image is sent to the victim too, and only counted is whether its answer differs.

Raw and sanitized answers agree on ordinary images; on adversarial ones the raw answer is the attacker's. Their rate of
disagreement rises when somebody attacks.

The raw answer never leaves the gateway, and no request waits for it or fails with it. But who reads how often a key's
answers disagreed learns a little of the raw answers: the counters are for the operator.
"""

import asyncio
import logging
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Final, Self

import anyio.to_thread
import numpy as np

from services.admission import Admission
from services.gateway.accounting import Bill
from services.gateway.pipeline import Forward
from services.protocol import deadlines
from services.protocol.errors import Overloaded
from services.upstream import Array, Prepaid

logger = logging.getLogger(__name__)

PURPOSE: Final = "shadow"
"""Under which its queries are counted."""


class Shadow:
    """Compares answers behind the requests' backs. An async context manager: what is in work at its end is given up.

    Args:
        forward: asks the victim about images as they are.
        max_images: images in work beyond which those of further requests are skipped.
        least_dice: Dice of two masks below which they disagree.
    """

    def __init__(self, forward: Forward, *, max_images: int, least_dice: float) -> None:
        """Watches nothing yet."""
        self._forward = forward
        self._admission = Admission(max_images)
        self._least_dice = least_dice
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives up what is in work."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def watch(self, images: Array, answered: Array, bill: Bill) -> None:
        """Begins to compare, if there is room for it; returns at once.

        Args:
            images: (N,C,H,W), raw; values outside [0,1] are clipped, as no image has them.
            answered: (N,K) or (N,K,H,W), largest where the class is that was answered.
            bill: on which N queries are reserved for it; they are spent unless the images are skipped.
        """
        room = ExitStack()
        try:
            room.enter_context(self._admission.admit(len(images)))
        except Overloaded:
            bill.account.shadow["skipped"] += len(images)
            return
        bill.spend(len(images), PURPOSE)
        task = asyncio.create_task(self._compare(images, answered, bill, room))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, images: Array, answered: Array, bill: Bill, room: ExitStack) -> None:
        counts = bill.account.shadow
        deadlines.lift()
        with room:
            try:
                raw = await self._forward(images.clip(0, 1), Prepaid(partial(bill.refund, purpose=PURPOSE)))
                differ = await anyio.to_thread.run_sync(disagreements, raw, answered, self._least_dice)
            except Exception as error:
                logger.info("a shadow query failed: %s", error)
                counts["failed"] += len(images)
            else:
                counts["disagreed"] += differ
                counts["agreed"] += len(images) - differ


def disagreements(first: Array, second: Array, least_dice: float) -> int:
    """How many of N images two answers differ on.

    Two answers of one class an image differ where the classes do. Two masks differ where their Dice is below
    `least_dice`: 2 |A and B| / (|A| + |B|), A and B the pixels with a class other than 0, and A and B those where it is
    the same; 1 if both masks are empty.

    Args:
        first: scores (N,K) or (N,K,H,W).
        second: scores of the same shape.
        least_dice: in [0,1].

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"answers of two shapes: {first.shape} and {second.shape}")
    one, other = first.argmax(axis=1), second.argmax(axis=1)
    if one.ndim == 1:
        return int(np.count_nonzero(one != other))
    pixels = tuple(range(1, one.ndim))
    sizes = np.count_nonzero(one, axis=pixels) + np.count_nonzero(other, axis=pixels)
    same = np.count_nonzero((one == other) & (one != 0), axis=pixels)
    return int(np.count_nonzero(2 * same < least_dice * sizes))
