"""The asyncio client of a victim or a gateway; use it through `services.protocol.client`."""

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol import oip, uploads
from services.protocol.errors import (
    TRANSIENT,
    Unavailable,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
    from_status,
)
from services.protocol.images import encode_png
from services.protocol.replicas import Replica
from services.protocol.scores import read_scores

CONNECT_TIMEOUT_S = 5.0
"""How long a replica is given at most to take a connection, and to tell its health."""

Wire = Literal["tensor", "image"]
"""How images travel: many a request as float32 tensors, or each by itself as an 8-bit PNG."""

_WORDS_LENGTH = 500
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
_NOT_READY = (UpstreamUnreachable.status, Unavailable.status, UpstreamTimeout.status)


class AsyncVictimClient:
    """Asks one victim, at one or several URLs, in large binary requests, or image by image where it knows only images.

    Args:
        urls: replicas of one victim; each request goes to the one with the fewest requests outstanding.
        batch: most images a request.
        in_flight: most requests at once, over all replicas and callers.
        timeout_s: seconds without progress after which a request has timed out; connecting, and health, have 5 at most.
        patience_s: for how long overload, broken connections, 502, 503, 504 and time-outs are waited out while no
            request at all succeeds. A replica that fails rests (exponential back-off with jitter), the others are used;
            `Retry-After` prolongs the rest up to the end of patience, when the last attempt is made.
            After other failures than overload, images are sent again only where `/v2/health/ready`, which costs
            nothing, does not speak against it. 0: nothing is waited for, but unless it timed out, a request moves on
            once to another replica that is not resting.
        on_resend: called with the number of images before they are transmitted once more after an earlier
            transmission failed. What it raises ends the request and reaches the caller.
        wire: "tensor": Open Inference Protocol, float32 there and back. "image": each image is uploaded by itself, as
            an 8-bit PNG in a form, and JSON comes back (`services.protocol.uploads`); `batch` has no meaning then.
        transport: in place of the network, for tests.

    Raises:
        InvalidInput: a URL is none.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        batch: int = 256,
        in_flight: int = 4,
        timeout_s: float = 60.0,
        patience_s: float = 0.0,
        on_resend: Callable[[int], None] | None = None,
        wire: Wire = "tensor",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Opens no connection yet."""
        if isinstance(urls, str) or not urls:
            raise ValueError("urls must be a sequence with at least one URL")
        if batch < 1 or in_flight < 1 or timeout_s <= 0 or patience_s < 0:
            raise ValueError("batch, in_flight and timeout_s must be positive, patience_s not negative")
        self._replicas = [Replica.at(url) for url in urls]
        self._batch = batch if wire == "tensor" else 1
        self._wire = wire
        self._labels: tuple[str, ...] | None = None
        self._patience_s = patience_s
        self._on_resend = on_resend
        self._slots = asyncio.Semaphore(in_flight)
        self._last_success = time.monotonic()
        self._quick_s = min(timeout_s, CONNECT_TIMEOUT_S)
        # An idle connection is given up sooner than the 5 seconds after which common servers close it: a request that
        # meets such a close fails. Waiting for a free connection has no limit, the semaphore sees to that.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=self._quick_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=in_flight, keepalive_expiry=2.0),
            transport=transport,
        )

    async def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The victim's scores.

        Args:
            images: (N,C,H,W), N at least 1.

        Returns:
            (N,K), or (N,K,H,W) from a segmenter; float32, finite, in the order of the images, exactly as the victim
            sent them. Only a segmenter's single plane of probabilities p is completed, to (1 - p, p).

        Raises:
            ServiceError: the victim refused, failed or could not be reached, by class; 4xx carry its own words.
            UpstreamInvalid: it answered something else than finite scores of such a shape.
        """
        if images.ndim != 4 or not len(images):
            raise ValueError(f"expected images of shape (N,C,H,W) with N at least 1, got {images.shape}")
        images = np.asarray(images, dtype=np.float32)
        ask = self._infer_chunk if self._wire == "tensor" else self._infer_image
        chunks = [images[start : start + self._batch] for start in range(0, len(images), self._batch)]
        tasks = [asyncio.create_task(ask(chunk)) for chunk in chunks]
        try:
            answers = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        if len({answer.shape[1:] for answer in answers}) > 1:
            raise UpstreamInvalid(
                "the victim changed its number of classes, or whether it scores images or pixels, between two requests"
            )
        return np.concatenate(answers)

    async def describe(self, image: npt.NDArray[np.float32]) -> dict[str, object]:
        """The victim's JSON answer on one image (C,H,W), which travels as an 8-bit PNG.

        Returns:
            at least `labels` (list of K str), and `label` (str) or, from a segmenter, `mask` (a PNG in base64);
            `probabilities` (list of K float) where it has any.
        """
        async with self._slots:
            body, headers = encode_png(image), {"Content-Type": "image/png"}
            if self._wire == "image":
                body, headers = uploads.encode_upload(image)
            response = await self._post(body, headers, count=1)
        try:
            answer = response.json()
        except ValueError as error:
            raise UpstreamInvalid(f"the victim's answer is no JSON: {error}") from error
        if not isinstance(answer, dict) or "labels" not in answer or not answer.keys() & {"label", "mask"}:
            raise UpstreamInvalid("the victim's answer has no labels, or neither a label nor a mask")
        return answer

    async def ready(self) -> bool:
        """Whether any replica says that it is ready."""
        return 200 in await asyncio.gather(*(self._health(replica) for replica in self._replicas))

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all connections."""
        await self.aclose()

    async def _infer_chunk(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        async with self._slots:  # also around the encoding, or every request of a large call would be in memory at once
            body, headers = oip.encode_request([oip.Tensor(oip.INPUT, images)])
            response = await self._post(body, headers, count=len(images))
        return read_scores(response.content, response.headers.get(oip.HEADER), images.shape)

    async def _infer_image(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The same for a single image, as an upload."""
        async with self._slots:
            body, headers = uploads.encode_upload(images[0])
            response = await self._post(body, headers, count=1)
        told = uploads.read_told(response.content, size=(images.shape[2], images.shape[3]))
        if told.labels is not None:
            self._labels = self._labels or told.labels
            if told.labels != self._labels:
                raise UpstreamInvalid("the victim changed its classes, or their order, between two requests")
        return told.scores[None]

    async def _post(self, body: bytes, headers: dict[str, str], *, count: int) -> httpx.Response:
        """Sends `count` images, again and again as far as patience goes; returns an answer with status 200."""
        paid = True  # the first transmission is accounted for by the caller
        failing_since: float | None = None
        replica = self._best()
        while True:
            if not paid and self._on_resend is not None:
                self._on_resend(count)
            started = time.monotonic()
            try:
                return await self._attempt(replica, body, headers)
            except TRANSIENT as error:
                paid = isinstance(error.__cause__, _NOT_SENT)
                now = time.monotonic()
                replica.failed(now, started=started, error=error)
                # Who waited for a time-out once, and has no patience, shall not wait for another one.
                at_once = failing_since is None and not isinstance(error, UpstreamTimeout)
                failing_since = failing_since or now
                recovered = await self._recovered(failing_since, at_once=at_once)
                if recovered is None:
                    raise
                replica = recovered

    async def _recovered(self, failing_since: float, *, at_once: bool) -> Replica | None:
        """The replica to send to after a failure; None: patience has ended.

        Args:
            failing_since: when the request failed first.
            at_once: whether a replica that need not rest is asked even without patience.
        """
        while True:
            now = time.monotonic()
            deadline = max(failing_since, self._last_success) + self._patience_s
            if now >= deadline and not (at_once and self._best().rests_until <= now):
                return None
            at_once = False
            replica = await self._rested(deadline)
            started = time.monotonic()
            if replica.overloaded or await self._health(replica) not in _NOT_READY:
                return replica
            replica.failed(time.monotonic(), started=started, error=None)

    async def _rested(self, deadline: float) -> Replica:
        """Waits for a replica to have rested, and not beyond the deadline."""
        while True:
            replica = self._best()
            now = time.monotonic()
            if now >= min(replica.rests_until, deadline):
                return replica
            await asyncio.sleep(min(replica.rests_until, deadline) - now)

    def _best(self) -> Replica:
        """The replica to ask next."""
        now = time.monotonic()
        return min(self._replicas, key=lambda one: one.rank(now))

    async def _health(self, replica: Replica) -> int:
        """The status that the replica's health answers with; 502 where nothing answers."""
        try:
            return (await self._http.get(replica.health, timeout=self._quick_s)).status_code
        except httpx.HTTPError:
            return UpstreamUnreachable.status

    async def _attempt(self, replica: Replica, body: bytes, headers: dict[str, str]) -> httpx.Response:
        """Sends one request once; everything but an answer with status 200 is raised."""
        replica.outstanding += 1
        try:
            response = await self._http.post(replica.url, content=body, headers=headers)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise UpstreamTimeout(f"the victim at {replica.url} did not answer in time") from error
        except httpx.HTTPError as error:
            raise UpstreamUnreachable(f"the victim at {replica.url} cannot be reached: {error}") from error
        finally:
            replica.outstanding -= 1
        if response.status_code == 200:
            self._last_success = time.monotonic()
            replica.succeeded()
            return response
        message = f"the victim at {replica.url} answered {response.status_code}: {_words(response)}"
        raise from_status(response.status_code, message, retry_after=_seconds(response.headers.get("Retry-After")))


def _words(response: httpx.Response) -> str:
    """What an error answer says, whatever its form."""
    try:
        return str(response.json()["error"])[:_WORDS_LENGTH]
    except (ValueError, LookupError, TypeError):
        return response.text[:_WORDS_LENGTH] or response.reason_phrase


def _seconds(retry_after: str | None) -> float | None:
    """The header's number of seconds; dates are not understood and count as absent."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
