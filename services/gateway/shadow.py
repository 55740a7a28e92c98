"""Shadow queries: the victim is also sent the raw image, only to count whether its answer differs.

Raw and sanitized answers agree on ordinary images; on adversarial ones the raw answer is the attacker's, so
disagreement rises during an attack. No request waits for the raw answer, fails with it or returns it. The counters are
for the operator only, as they reveal a little of the raw answers.
"""

import asyncio
import logging
from contextlib import ExitStack
from functools import partial
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
    """Compares answers in the background. An async context manager: on exit, unfinished comparisons are cancelled.

    Args:
        forward: asks the victim about raw images.
        max_images: images in work beyond which further ones are skipped.
        least_dice: Dice of two masks below which they disagree.
    """

    def __init__(self, forward: Forward, *, max_images: int, least_dice: float) -> None:
        self._forward = forward
        self._admission = Admission(max_images)
        self._least_dice = least_dice
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(self, *_raised: object) -> None:
        """Cancels unfinished comparisons."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def watch(self, images: Array, answered: Array, bill: Bill) -> None:
        """Starts a comparison if there is room, and returns at once.

        Args:
            images: (N,C,H,W), raw; values are clipped to [0,1].
            answered: (N,K) or (N,K,H,W), largest at the class that was answered.
            bill: has N queries reserved; they are spent unless the images are skipped.
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
    """On how many of N images two score arrays of the same shape, (N,K) or (N,K,H,W), disagree.

    Single classes disagree if they differ, masks if their Dice, 2 |A and B| / (|A| + |B|), is below `least_dice`: A and
    B are the pixels of a class other than 0, "A and B" those where it is the same; 1 if both are empty.

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
