"""Images of several requests in one request to the victim, where they would wait for one another anyway.

The first few requests go at once, each alone, so that nobody waits for company. What comes while those are under way is
sent together as soon as one of them is answered: a victim is asked seldom and about much, and the gateway spends its
time on images instead of messages.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import numpy as np

from services.batching import Array
from services.protocol import deadlines
from services.protocol.errors import TRANSIENT, ServiceError

Send = Callable[[Array], Awaitable[Array]]
"""Asks the victim about (N,C,H,W): its scores (N,...)."""


@dataclass(eq=False)
class _Job:
    """The images of one request, and who waits for their scores."""

    images: Array
    answer: asyncio.Future[Array]
    deadline: float
    context: Context = field(default_factory=copy_context)
    batch: asyncio.Task[None] | None = None


class Merger:
    """Sends images to the victim, those of several callers together.

    Args:
        send: asks the victim.
        max_images: most images of several callers in one request; those of one caller are never split.
        lanes: requests under way from which on further ones wait to be sent together.
        on_resend: called with the images that are sent once more, each caller's by themselves, because the request for
            several callers was refused.
    """

    def __init__(self, send: Send, *, max_images: int, lanes: int, on_resend: Callable[[int], None]) -> None:
        """Sends nothing yet."""
        self._send = send
        self._max_images = max_images
        self._lanes = lanes
        self._on_resend = on_resend
        self._waiting: list[_Job] = []
        self._batches: dict[asyncio.Task[None], list[_Job]] = {}

    async def __call__(self, images: Array) -> Array:
        """The scores (N,...) of images (N,C,H,W).

        A caller who is cancelled waits no longer; the request to the victim ends with the last of its callers.

        Raises:
            Exception: what `send` raised.
        """
        loop = asyncio.get_running_loop()
        job = _Job(images, loop.create_future(), loop.time() + deadlines.left_s())
        self._waiting.append(job)
        self._begin()
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._leave(job)
            raise

    def _leave(self, job: _Job) -> None:
        if job.batch is None:
            self._waiting.remove(job)
            return
        others = self._batches.get(job.batch)
        if others is not None and job in others:
            others.remove(job)
            if not others:
                job.batch.cancel()

    def _begin(self) -> None:
        """Sends what waits, as long as there is a lane for it."""
        while self._waiting and len(self._batches) < self._lanes:
            jobs = [self._waiting.pop(0)]
            room = self._max_images - len(jobs[0].images)
            while self._waiting and len(self._waiting[0].images) <= room:
                jobs.append(self._waiting.pop(0))
                room -= len(jobs[-1].images)
            # In the context of its first caller: its request's id and trace travel along.
            batch = asyncio.get_running_loop().create_task(self._ask(list(jobs)), context=jobs[0].context)
            self._batches[batch] = jobs
            for job in jobs:
                job.batch = batch
            batch.add_done_callback(self._ended)

    def _ended(self, batch: asyncio.Task[None]) -> None:
        del self._batches[batch]
        self._begin()

    async def _ask(self, jobs: Sequence[_Job]) -> None:
        """Answers all of the jobs, with scores or with an error."""
        if len(jobs) > 1:
            deadlines.lift()
            deadlines.narrow(max(job.deadline for job in jobs) - asyncio.get_running_loop().time())
        try:
            scores = await self._send(np.concatenate([job.images for job in jobs]) if len(jobs) > 1 else jobs[0].images)
        except Exception as error:
            if len(jobs) > 1 and isinstance(error, ServiceError) and not isinstance(error, TRANSIENT):
                for job in jobs:  # nobody shall fail for what another one sent
                    if not job.answer.done():
                        self._on_resend(len(job.images))
                        await self._ask([job])
                return
            for job in jobs:
                if not job.answer.done():
                    job.answer.set_exception(error)
            return
        begin = 0
        for job in jobs:
            rows = scores[begin : begin + len(job.images)]
            begin += len(job.images)
            if not job.answer.done():
                job.answer.set_result(rows)
