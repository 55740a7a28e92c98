"""One version of the sanitizer at work: the parts that are replaced when the version changes."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Self

import httpx

from defense.artifact import Manifest
from services.admission import Admission
from services.gateway.accounting import Account
from services.gateway.config import GatewaySettings
from services.gateway.metrics import Metrics
from services.gateway.modes import Modes
from services.gateway.pipeline import Pipeline
from services.gateway.repository import Version
from services.gateway.shadow import Shadow
from services.gateway.voting import Voter
from services.protocol.responses import Signature


class Defense:
    """A version at work, with batches of its own. An async context manager: it works inside only.

    The arguments after `version` and `settings` are those of `Pipeline`.

    Attributes:
        shape: (C,H,W) of the images.
        signature: who answers, except for the class names.

    Raises:
        ServiceError: a URL or the mapping is invalid, the device cannot be used, or a mode could never answer.
    """

    def __init__(
        self,
        version: Version,
        settings: GatewaySettings,
        *,
        own: Account,
        admission: Admission,
        metrics: Metrics,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        artifact = version.artifact
        self.number = version.number
        self.manifest = artifact.manifest
        self.shape = (self.manifest.input.channels, self.manifest.input.height, self.manifest.input.width)
        self.modes = Modes(settings, self.manifest.sigma)
        self.signature = _signature(self.manifest, settings.model_name, version.number)
        self.pipeline = Pipeline(
            artifact.sanitizer,
            self.shape,
            self.manifest.labels,
            settings,
            own=own,
            admission=admission,
            metrics=metrics,
            transport=transport,
        )
        self.vote = Voter(self.pipeline.ask, chunk=settings.chunk)
        self.shadow = Shadow(self.pipeline.forward, max_images=settings.max_queue, least_dice=settings.shadow_dice)
        self._open = AsyncExitStack()
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def __aenter__(self) -> Self:
        """Starts the sanitizer's thread."""
        await self._open.enter_async_context(self.pipeline)
        await self._open.enter_async_context(self.shadow)
        return self

    async def __aexit__(self, *_raised: object) -> None:
        """Cancels shadow queries, ends the thread, and closes all connections."""
        await self._open.aclose()

    @contextmanager
    def in_use(self) -> Iterator[Self]:
        """Keeps this version alive for a request."""
        self._users += 1
        self._unused.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def retire(self) -> None:
        """Waits for the requests in work to end, then closes the version; no further ones may come."""
        await self._unused.wait()
        await self._open.aclose()


Build = Callable[[Version], Defense]
"""Makes a defense of a version."""


def _signature(manifest: Manifest, model_name: str, number: str) -> Signature:
    identity = {"id": manifest.id, "name": manifest.name, "version": number}
    origin = {"sigma": manifest.sigma, "queries_spent": manifest.queries_spent}
    return Signature(
        model_name=model_name,
        model_version=number,
        labels=(),
        extra={"artifact": {**identity, **origin}},
        parameters={**{f"artifact_{name}": value for name, value in identity.items()}, **origin},
        headers={"X-Artifact-Id": manifest.id},
    )
