"""Dynamic batching: concurrent requests of any size become batches, each computed and then, perhaps, asked about.

A batch is formed once. Where there is an upstream, the unit of work is "compute, then ask": one batch at a time is
computed, while as many as the upstream holds are under way to it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from services.protocol import deadlines
from services.protocol.errors import Unavailable
from services.upstream import NO_IMAGES_FAULT, NOBODY, Array, Payer, Share, Upstream


@dataclass(eq=False)
class _Job:
    """One request."""

    images: Array
    payer: Payer
    future: asyncio.Future[Array]
    due: float  # when its first image has waited long enough for others
    deadline: float
    context: Context = field(default_factory=copy_context)
    taken: int = 0
    rows: dict[int, Array] = field(default_factory=dict)  # by the number of their first image


@dataclass(frozen=True)
class _Part:
    """Images of a job that are in one batch, from its image number `start` on."""

    job: _Job
    start: int
    images: Array


class Batcher:
    """Merges concurrent requests into batches.

    Requests are served first come, first served; one that is larger than a batch is split, and others go between its
    batches. What waits is divided among the batches that the upstream holds, so that none of its replicas idles while
    another one has a full batch. A batch that fails is tried again in parts, so that a request fails for its own images
    only. An async context manager: it works inside only.

    Args:
        compute: maps (n,...) float32, 1 <= n <= max_batch, to an array with n rows; called in one thread of its own,
            with an array that it may keep and change. None: there is nothing to compute.
        max_batch: most images a batch.
        max_delay_s: how long the first image of a batch waits for others.
        upstream: who is asked about what was computed; None: the computed rows are the answer.
    """

    def __init__(
        self,
        compute: Callable[[Array], Array] | None,
        *,
        max_batch: int,
        max_delay_s: float,
        upstream: Upstream | None = None,
    ) -> None:
        """Starts nothing yet."""
        if max_batch < 1 or max_delay_s < 0:
            raise ValueError("max_batch must be positive, max_delay_s not negative")
        self._compute = compute
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._upstream = upstream
        self._jobs: deque[_Job] = deque()  # those with images that were not taken yet
        self._live: set[_Job] = set()  # those that are not answered yet
        self._waiting = 0  # images that were not taken yet
        self._under_way: dict[asyncio.Task[None], Sequence[_Part]] = {}
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self._worker: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Starts the work."""
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Refuses what is not answered yet, and ends the thread after the batch in hand."""
        worker, self._worker = self._worker, None
        tasks = [*self._under_way, *([worker] if worker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in tuple(self._live):
            self._end(job, Unavailable("the service is shutting down"))
        await asyncio.to_thread(self._thread.shutdown)  # the batch in hand may take a while; others go on meanwhile

    async def __call__(self, images: Array, payer: Payer = NOBODY) -> Array:
        """The rows for these images (n,...), n at least 1, in order.

        Raises Unavailable if the batcher is not running, else what `compute` or the upstream raised for these images.
        """
        self._check_running()
        loop = asyncio.get_running_loop()
        now = loop.time()
        job = _Job(images, payer, loop.create_future(), now + self._max_delay_s, now + deadlines.left_s())
        self._jobs.append(job)
        self._live.add(job)
        self._waiting += len(images)
        self._changed.set()
        try:
            return await job.future
        except asyncio.CancelledError:  # nobody waits for the rest any more
            self._end(job)
            raise

    async def compute(self, images: Array) -> Array:
        """What is computed of these images (n,...), without asking the upstream. Raises as a call does."""
        self._check_running()
        loop = asyncio.get_running_loop()
        starts = range(0, len(images), self._max_batch)
        batches = [images[start : start + self._max_batch] for start in starts]
        rows = [(await loop.run_in_executor(self._thread, self._run, [one]))[0] for one in batches]
        return np.concatenate(rows)

    def _check_running(self) -> None:
        if self._worker is None:
            raise Unavailable("the service is shutting down")

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_batch()
            parts = self._take()
            if self._compute is not None:
                outcomes = await loop.run_in_executor(self._thread, self._try, [part.images for part in parts])
                parts = list(self._computed_parts(parts, outcomes))
            if self._upstream is None or self._upstream.together:
                self._go_on(parts)
            else:
                for part in parts:
                    self._go_on([part])

    async def _wait_for_batch(self) -> None:
        """Waits until the upstream has room, and a batch is full or its first image has waited long enough."""
        while True:
            self._changed.clear()
            left: float | None = None
            if self._jobs and (self._upstream is None or len(self._under_way) < self._upstream.width()):
                left = self._jobs[0].due - asyncio.get_running_loop().time()
                if left <= 0 or self._waiting >= self._max_batch:
                    return
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _take(self) -> list[_Part]:
        """Takes one batch off the queue: whole requests up to a fair share, split only where a batch is full."""
        share = self._max_batch
        if self._upstream is not None and not self._upstream.together:  # divided request by request later on
            share = min(share, self._upstream.width() - len(self._under_way))
        elif self._upstream is not None:
            asked = sum(len(part.images) for parts in self._under_way.values() for part in parts)
            share = min(share, -(-(self._waiting + asked) // self._upstream.width()))
        parts: list[_Part] = []
        count = 0
        while self._jobs and count < share:
            job = self._jobs[0]
            images = job.images[job.taken : job.taken + self._max_batch - count]
            parts.append(_Part(job, job.taken, images))
            count += len(images)
            job.taken += len(images)
            if job.taken == len(job.images):
                self._jobs.popleft()
            elif len(parts) == 1:  # one that fills batches alone lets others go between them
                self._jobs.rotate(-1)
        self._waiting -= count
        return parts

    def _computed_parts(self, parts: Sequence[_Part], outcomes: Sequence[Array | Exception]) -> Iterator[_Part]:
        """The parts with what was computed of them; requests whose images failed are answered with the error."""
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._end(part.job, outcome)
            else:
                yield replace(part, images=outcome)

    def _go_on(self, parts: Sequence[_Part], *, again: bool = False) -> None:
        """Asks the upstream about computed parts, as far as somebody still waits for them; without one, answers."""
        parts = [part for part in parts if not part.job.future.done()]
        if self._upstream is None:
            for part in parts:
                self._keep(part, part.images)
        elif parts:
            # In the context of its first request, whose id and trace travel along.
            task = asyncio.get_running_loop().create_task(
                self._ask(self._upstream, parts, again), context=parts[0].job.context.copy()
            )
            self._under_way[task] = parts
            task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        parts = self._under_way.pop(task)
        if task.cancelled():  # as nobody waits any more, or by what it waited for
            for part in parts:
                self._end(part.job, Unavailable("the work on this request was given up"))
        self._changed.set()

    async def _ask(self, upstream: Upstream, parts: Sequence[_Part], again: bool) -> None:
        """Answers parts with the upstream's rows. If one of them may be at fault, each is sent again by itself."""
        deadlines.lift()
        deadlines.narrow(max(part.job.deadline for part in parts) - asyncio.get_running_loop().time())
        shares = [Share(part.job.payer, len(part.images)) for part in parts]
        try:
            images = [part.images for part in parts]
            rows = await upstream.ask(np.concatenate(images) if len(images) > 1 else images[0], shares, again)
            for part, own in zip(parts, _split(rows, images), strict=True):
                self._keep(part, own)
        except Exception as error:
            if len(parts) > 1 and not isinstance(error, NO_IMAGES_FAULT):
                for part in parts:
                    self._go_on([part], again=True)
            else:
                for part in parts:
                    self._end(part.job, error)

    def _keep(self, part: _Part, rows: Array) -> None:
        """Keeps the rows of a part, and answers its request once it has all of them."""
        job = part.job
        if job.future.done():
            return
        job.rows[part.start] = rows
        if sum(map(len, job.rows.values())) < len(job.images):
            return
        try:
            answer = np.concatenate([job.rows[start] for start in sorted(job.rows)]) if len(job.rows) > 1 else rows
        except Exception as error:  # above all: the rows of two batches differ in shape
            self._end(job, error)
        else:
            self._live.discard(job)
            job.future.set_result(answer)

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        """Ends a request, answered with `error`: drops its images, and what is under way for nobody any more."""
        if job not in self._live:
            return
        self._live.remove(job)
        if job.taken < len(job.images):
            self._jobs.remove(job)
            self._waiting -= len(job.images) - job.taken
        if error is not None and not job.future.done():
            job.future.set_exception(error)
        for task, parts in self._under_way.items():
            if task is not asyncio.current_task() and all(part.job.future.done() for part in parts):
                task.cancel()

    def _try(self, parts: Sequence[Array]) -> list[Array | Exception]:
        """Runs in the thread: the rows of each part or its error, found by halving a batch that fails."""
        try:
            return list(self._run(parts))
        except Exception as error:
            if len(parts) == 1:
                return [error]
        half = len(parts) // 2
        return self._try(parts[:half]) + self._try(parts[half:])

    def _run(self, parts: Sequence[Array]) -> list[Array]:
        """Runs in the thread: one batch, copied together so that `compute` gets aligned memory of its own."""
        assert self._compute is not None
        try:
            rows: npt.NDArray[Any] = self._compute(np.concatenate(parts))
        except (StopIteration, asyncio.CancelledError, SystemExit) as error:
            # A future takes these for signals to itself: raised as they are they would end the worker, not the request.
            raise RuntimeError(f"the batch ended with {type(error).__name__}") from error
        return _split(rows, parts)


def _split(rows: Array, parts: Sequence[Array]) -> list[Array]:
    """The rows of each part of a batch."""
    sizes = [len(part) for part in parts]
    if len(rows) != sum(sizes):
        raise RuntimeError(f"{sum(sizes)} images were answered with {len(rows)} rows")
    return np.split(rows, np.cumsum(sizes)[:-1])
