"""How long a request may take, and whether anybody still waits for its answer.

A client says how many seconds it will wait, from when its request is sent, in the header `X-Request-Timeout`; clients
of the Open Inference Protocol may say so as Triton's do, in microseconds, as the request's parameter `timeout`. The
service has a bound of its own; the nearest of them counts. What is left of it travels on with every request to the
victim, so that nobody works for an answer that comes too late.
"""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar

from fastapi import Request

from services.protocol.errors import ClientGone, DeadlineExceeded, InvalidInput

HEADER: Final = "X-Request-Timeout"
"""Seconds, as a decimal number, that the sender waits for the answer."""

_SECONDS: Final = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # on the clock of the event loop

_LEAST_S: Final = 0.001
_OVER: Final = "the time that this request has is over; allow more, or ask for less"

_T = TypeVar("_T")


def begin(request: Request, most_s: float) -> None:
    """Starts the clock of a request, in the task that handles it.

    Args:
        request: the request, which may say how long its client waits.
        most_s: the service's own bound, in seconds.

    Raises:
        InvalidInput: the header is no positive number of seconds.
    """
    told = request.headers.get(HEADER)
    _deadline.set(math.inf)
    narrow(most_s)
    if told is None:
        return
    if not _SECONDS.fullmatch(told) or not float(told):
        raise InvalidInput(f"{HEADER} is {told[:40]!r}; it is how long you wait, in seconds, above 0")
    narrow(float(told))


def narrow(seconds: float) -> None:
    """Brings the deadline of this task's request forward to so many seconds from now; it is never put off."""
    _deadline.set(min(_deadline.get(), asyncio.get_running_loop().time() + seconds))


def lift() -> None:
    """Takes the deadline off this task, whose work goes on when the request that began it is answered."""
    _deadline.set(math.inf)


def left_s() -> float:
    """Seconds that are left of this task's request, perhaps below 0; infinite where it has no deadline."""
    deadline = _deadline.get()
    return deadline if math.isinf(deadline) else deadline - asyncio.get_running_loop().time()


def travelling() -> dict[str, str]:
    """The header that tells the next service what is left; none without a deadline.

    Raises:
        DeadlineExceeded: nothing is.
    """
    left = left_s()
    if math.isinf(left):
        return {}
    if left < _LEAST_S:
        raise DeadlineExceeded(_OVER)
    return {HEADER: f"{left:.3f}"}


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """Ends what is done inside when the deadline passes.

    Raises:
        DeadlineExceeded: it did.
    """
    left = left_s()
    try:
        async with asyncio.timeout(None if math.isinf(left) else left):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(_OVER) from error


async def attended(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Does the work of a request as long as somebody waits for it; then cancels it, which frees all it holds.

    Args:
        request: the request, its body read.
        work: what answers it.

    Returns:
        what the work returns.

    Raises:
        DeadlineExceeded: the deadline of `begin` and `narrow` has passed.
        ClientGone: the client hung up.
        Exception: what the work raises.
    """
    answer = asyncio.create_task(work)
    hung_up = asyncio.create_task(_hung_up(request))
    tasks = {answer, hung_up}
    try:
        async with in_time():
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone("the client hung up before the answer was there")
        return answer.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
