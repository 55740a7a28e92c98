"""Dynamic batching: requests of any size, asked concurrently, become full batches for one device."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from services.protocol.errors import Overloaded, Unavailable

Array = npt.NDArray[np.float32]

RETRY_AFTER_S = 1.0


class Admission:
    """Bounds the work that a service has accepted and not finished, counted in images.

    Args:
        max_images: the bound. A request beyond it is refused, but never on its own account: an idle service takes a
            request of any size.
    """

    def __init__(self, max_images: int) -> None:
        """Starts idle."""
        self._max_images = max_images
        self._images = 0

    @property
    def images(self) -> int:
        """Images in work."""
        return self._images

    def check(self, images: int) -> None:
        """Refuses now what `admit` would refuse, before more work is put into it.

        Raises:
            Overloaded: too many images are in work already.
        """
        if self._images and self._images + images > self._max_images:
            raise Overloaded(f"{self._images} images are in work already; come back later", retry_after=RETRY_AFTER_S)

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Counts a request as long as the context lasts.

        Raises:
            Overloaded: too many images are in work already.
        """
        self.check(images)
        self._images += images
        try:
            yield
        finally:
            self._images -= images


@dataclass(eq=False)
class _Job:
    """One request: its images, how many of them were handed to the device, and the answers so far."""

    images: Array
    future: asyncio.Future[Array]
    deadline: float
    taken: int = 0
    answers: list[Array] = field(default_factory=list)


class Batcher:
    """Merges concurrent requests into batches for one function that runs in one thread.

    Requests are served first come, first served; one that is larger than a batch is split, and its last part shares a
    batch with what comes next. Everything is counted in images. An async context manager: it works inside only.

    Args:
        run: maps (n,...) float32, 1 <= n <= max_batch, to an array with n rows; called in one thread of its own, with
            an array that it may keep and change.
        max_batch: most images a batch.
        max_delay_s: how long the first image of a batch waits for others.
    """

    def __init__(self, run: Callable[[Array], Array], *, max_batch: int, max_delay_s: float) -> None:
        """Starts nothing yet."""
        if max_batch < 1 or max_delay_s < 0:
            raise ValueError("max_batch must be positive, max_delay_s not negative")
        self._run = run
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._jobs: deque[_Job] = deque()
        self._waiting = 0  # images in `_jobs` that the device has not taken
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
        """Refuses what is still waiting, and ends the thread after the batch in hand."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        while self._jobs:
            self._drop(self._jobs[0], Unavailable("the service is shutting down"))
        self._thread.shutdown()

    async def __call__(self, images: Array) -> Array:
        """The rows of `run` for these images (n,...), n at least 1, in order.

        Raises:
            Unavailable: the batcher is not running.
            Exception: what `run` raised for a batch with any of these images.
        """
        if self._worker is None:
            raise Unavailable("the service is shutting down")
        loop = asyncio.get_running_loop()
        job = _Job(images, loop.create_future(), loop.time() + self._max_delay_s)
        self._jobs.append(job)
        self._waiting += len(images)
        self._changed.set()
        try:
            return await job.future
        except asyncio.CancelledError:  # nobody waits for the rest any more
            self._drop(job)
            raise

    def _drop(self, job: _Job, error: Exception | None = None) -> None:
        """Takes a job out of the queue, and answers it with `error`."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._waiting -= len(job.images) - job.taken
        if error is not None and not job.future.done():
            job.future.set_exception(error)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._fill()
            parts = self._take()
            if not parts:
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self._run_parts, [images for _, images in parts])
            except Exception as error:
                for job, _ in parts:
                    self._drop(job, error)
            except asyncio.CancelledError:
                for job, _ in parts:
                    self._drop(job, Unavailable("the service is shutting down"))
                raise
            else:
                for (job, _), rows in zip(parts, answers, strict=True):
                    self._keep(job, rows)

    def _keep(self, job: _Job, rows: Array) -> None:
        """Keeps the answers to the part that was taken last, and answers the job once it has all of them."""
        job.answers.append(rows)
        if job.taken < len(job.images) or job.future.done():
            return
        try:
            answer = np.concatenate(job.answers)
        except Exception as error:  # above all: the rows of two batches differ in shape
            job.future.set_exception(error)
        else:
            job.future.set_result(answer)

    async def _fill(self) -> None:
        """Waits until a batch is full, or its first image has waited long enough."""
        while self._waiting < self._max_batch:
            self._changed.clear()
            left = self._jobs[0].deadline - asyncio.get_running_loop().time() if self._jobs else None
            if left is not None and left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Job, Array]]:
        """Takes one batch off the queue, as parts of jobs."""
        parts: list[tuple[_Job, Array]] = []
        room = self._max_batch
        while room and self._jobs:
            job = self._jobs[0]
            images = job.images[job.taken : job.taken + room]
            job.taken += len(images)
            self._waiting -= len(images)
            room -= len(images)
            parts.append((job, images))
            if job.taken == len(job.images):
                self._jobs.popleft()
        return parts

    def _run_parts(self, parts: Sequence[Array]) -> list[Array]:
        """Runs in the thread: one batch, copied together so that `run` gets aligned memory of its own."""
        batch = np.concatenate(parts)
        try:
            answers: npt.NDArray[Any] = self._run(batch)
        except (StopIteration, asyncio.CancelledError, SystemExit) as error:
            # A future takes these for signals to itself: raised as they are they would end the worker, not the request.
            raise RuntimeError(f"the batch ended with {type(error).__name__}") from error
        if len(answers) != len(batch):
            raise RuntimeError(f"{len(batch)} images were answered with {len(answers)} rows")
        return np.split(answers, np.cumsum([len(part) for part in parts])[:-1])
