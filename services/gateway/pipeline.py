"""An image's way through the gateway: sanitized, forwarded, and the victim's scores back."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

import httpx
import numpy as np
import torch
from torch import nn

from services.admission import Admission
from services.batching import Batcher
from services.device import resolve_device
from services.gateway.accounting import Account
from services.gateway.compilers import Runtime, load_runtime
from services.gateway.config import GatewaySettings
from services.gateway.metrics import Metrics
from services.gateway.readiness import Readiness
from services.protocol.client import AsyncVictimClient
from services.protocol.errors import (
    TRANSIENT,
    CircuitOpen,
    Overloaded,
    ServiceError,
    Unavailable,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from services.protocol.mapping import load_mapping
from services.upstream import Array, Payer, Share, Upstream

Forward = Callable[[Array, Payer], Awaitable[Array]]
"""Images (N,C,H,W) as they are, and who pays for them -> the victim's scores for them."""

# What clients are told of the victim's failures: the meaning, not the inside (addresses, the victim's own words).
_TOLD: dict[type[ServiceError], str] = {
    Overloaded: "the model behind the gateway is overloaded; come back later",
    Unavailable: "the model behind the gateway is not available; come back later",
    CircuitOpen: "the model behind the gateway failed again and again, and was not asked; come back later",
    UpstreamUnreachable: "the model behind the gateway cannot be reached",
    UpstreamTimeout: "the model behind the gateway did not answer in time",
    UpstreamInvalid: "the model behind the gateway gave no valid answer",
}
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)


class Pipeline:
    """A sanitizer and the victim behind it. An async context manager: it works inside only.

    Args:
        shape: (C,H,W) of the images.
        labels: the victim's classes if the artifact knows them, else empty.
        own: the account of queries that belong to no client.
        admission: counts images in work.
        metrics: counts and times batches.
        transport: replaces the network to the victim in tests.

    Raises:
        ServiceError: a URL or the mapping is invalid, or the device or the runtime cannot be used.
    """

    def __init__(
        self,
        sanitizer: nn.Module,
        shape: tuple[int, int, int],
        labels: Sequence[str],
        settings: GatewaySettings,
        *,
        own: Account,
        admission: Admission,
        metrics: Metrics,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._shape = shape
        self._labels = labels
        self._own = own
        self._admission = admission
        self._metrics = metrics
        self._request_size = settings.forward_batch
        mapping = load_mapping(settings.victim_mapping)
        self._victim = AsyncVictimClient(
            settings.victim_url,
            batch=settings.forward_batch,
            in_flight=settings.in_flight,
            timeout_s=settings.timeout_s,
            wire=settings.wire,
            mapping=mapping,
            on_resend=partial(own.spend, "resent"),
            transport=transport,
        )
        runtime = load_runtime(settings.runtime, sanitizer, shape, resolve_device(settings.device))
        self.runtime = runtime.kind
        self._in_flight = settings.in_flight
        # A victim that takes one image a request is asked about each at once, not about many in turn.
        self._takes_many = settings.wire == "tensor" and (mapping is None or mapping.image is None)
        upstream = Upstream(self._ask, self._width, together=self._takes_many)
        size, delay_s = settings.max_batch, settings.max_delay_ms / 1000
        sanitizing = metrics.sanitizing(_sanitizing(runtime))
        self._batcher = Batcher(sanitizing, max_batch=size, max_delay_s=delay_s, upstream=upstream)
        # Images as they are, in batches of their own: they never travel with those that are sanitized.
        self._raw = Batcher(None, max_batch=size, max_delay_s=delay_s, upstream=upstream)
        self.ready = Readiness(self._victim.ready)
        self._learned_labels: dict[int, Sequence[str]] = {}  # by number of classes
        self._learned_shape: tuple[int, ...] = ()  # of the scores for one image: (K), or (K,H,W)
        self._learning = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Starts the sanitizer's thread."""
        await self._batcher.__aenter__()
        await self._raw.__aenter__()
        return self

    async def __aexit__(self, *_raised: object) -> None:
        """Ends the thread, and closes all connections."""
        try:
            await self._raw.__aexit__(None, None, None)
            await self._batcher.__aexit__(None, None, None)
        finally:
            await self._victim.aclose()

    async def sanitize(self, images: Array) -> Array:
        """The sanitized images (N,C,H,W), without asking the victim."""
        return await self._batcher.compute(images)

    async def ask(self, images: Array, payer: Payer) -> Array:
        """The victim's scores, (N,K) or (N,K,H,W), for the sanitized images (N,C,H,W); `payer` pays N queries.

        Raises ServiceError, with a message for clients, if the victim failed.
        """
        return self._checked(await self._batcher(images, payer))

    async def forward(self, images: Array, payer: Payer) -> Array:
        """The victim's scores for raw images; otherwise as `ask`."""
        return self._checked(await self._raw(images, payer))

    def _checked(self, scores: Array) -> Array:
        if self._labels and scores.shape[1] != len(self._labels):
            raise UpstreamInvalid(
                f"the model answers {scores.shape[1]} scores; the artifact has {len(self._labels)} labels"
            )
        self._learned_shape = scores.shape[1:]
        return scores

    def _width(self) -> int:
        """How many requests to have under way: two for each replica, or `in_flight` where each image is a request."""
        return min(self._in_flight, 2 * self._victim.replicas) if self._takes_many else self._in_flight

    async def _ask(self, images: Array, shares: Sequence[Share], again: bool) -> Array:
        """Asks the victim about one batch; repeated queries are charged to the gateway's own account."""
        if again:
            self._own.spend("resent", len(images))
        else:
            for share in shares:
                share.payer.spend(share.images)
        with _retold():
            try:
                with self._metrics.upstream():
                    return await self._victim.infer(images)
            except (UpstreamUnreachable, CircuitOpen) as error:
                not_sent = isinstance(error, CircuitOpen) or isinstance(error.__cause__, _NOT_SENT)
                # Of several requests, others may have been sent.
                if not_sent and len(images) <= self._request_size:
                    if again:
                        self._own.spend("resent", -len(images))
                    else:
                        for share in shares:
                            share.payer.refund(share.images)
                raise

    async def names(self, images: Array, classes: int) -> Sequence[str]:
        """The class names: the artifact's or the victim's, asked for once, with a sanitized image; else numbers."""
        if self._labels:
            return self._labels
        async with self._learning:
            if classes not in self._learned_labels:
                sanitized = await self.sanitize(images[:1])
                self._own.spend("labels", 1)
                try:
                    with _retold():
                        told = (await self._victim.describe(sanitized[0]))["labels"]
                except TRANSIENT:
                    raise
                except ServiceError:  # it takes no images, or has no names; asking again would cost a query each time
                    told = None
                names = told if isinstance(told, list) and len(told) == classes else range(classes)
                self._learned_labels[classes] = [str(name) for name in names]
            return self._learned_labels[classes]

    async def scores_shape(self) -> tuple[int, ...]:
        """The shape of the victim's answer to one image; before any was sent, found by asking once about a grey one.

        Neither the artifact nor the victim's URL says whether it scores images or pixels.
        """
        async with self._learning:
            if not self._learned_shape:
                with self._admission.admit(1), self._own.bill("shape", 1) as bill:
                    await self.ask(np.full((1, *self._shape), 0.5, np.float32), bill)
            return self._learned_shape


@contextmanager
def _retold() -> Iterator[None]:
    """Turns the victim's failures into those that clients are told."""
    try:
        yield
    except ServiceError as error:
        # What else the victim objects to (400, 413, ...) was said of the gateway's request, not the client's.
        kind = type(error) if type(error) in _TOLD else UpstreamInvalid
        raise kind(_TOLD[kind], retry_after=error.retry_after) from error


def _sanitizing(runtime: Runtime) -> Callable[[Array], Array]:
    """The batcher's function, (n,C,H,W) to the same; it refuses to return values outside [0,1]."""

    @torch.inference_mode()
    def run(images: Array) -> Array:
        sanitized = runtime.run(torch.from_numpy(images))
        if sanitized.shape != images.shape or not bool(((sanitized >= 0) & (sanitized <= 1)).all()):
            raise RuntimeError("the sanitizer returned something that is no image in [0,1]")
        array: Array = sanitized.numpy()
        return array

    return run
