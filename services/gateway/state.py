"""The parts of a running gateway, shared by its handlers."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Self

import httpx

from services.admission import Admission
from services.gateway.accounting import Accounts, Budget
from services.gateway.config import GatewaySettings
from services.gateway.defense import Defense
from services.gateway.detection import Detector
from services.gateway.metrics import Metrics
from services.gateway.repository import Repository, Version
from services.gateway.versions import Versions, reloading_on_hangup
from services.protocol.decoding.pool import DecodingPool, Limits
from services.protocol.errors import NotFound, Unavailable
from services.server import access_of


class Gateway:
    """The parts of a gateway. Arguments and errors are those of `services.gateway.app.make_gateway`.

    Attributes:
        images: counts images in work.
        copies: counts noisy copies in work, separately, so that neither ordinary traffic nor large requests for copies
            crowd out the other.
        versions: the sanitizer at work, and how to replace it.
        access: who may ask, and how fast.
    """

    def __init__(
        self,
        version: Version,
        settings: GatewaySettings,
        *,
        repository: Repository | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings = settings
        self.accounts = Accounts(Budget(settings.budget, settings.budget_window_s))
        self.images = Admission(settings.max_queue)
        self.copies = Admission(settings.max_copies)
        self.metrics = Metrics()
        own = self.accounts.own
        build = partial(
            Defense, settings=settings, own=own, admission=self.images, metrics=self.metrics, transport=transport
        )
        self.versions = Versions(version, build, repository, settings, own)
        queues = {"images": self.images, "copies": self.copies}
        self.metrics.watch(self.accounts, queues, lambda: (self.current.number, self.current.manifest.id))
        self.detector = Detector(settings)
        self.decoders = DecodingPool(settings.decoders, limits=Limits.for_files(settings.max_body_bytes))
        self.access = access_of(settings, self.accounts.name)

    @property
    def current(self) -> Defense:
        """The version that answers now."""
        return self.versions.current

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Works as long as the context lasts."""
        with self.metrics.serving(self.settings.host, self.settings.metrics_port):
            async with self.versions, self.decoders:
                with reloading_on_hangup(self.versions):
                    yield self

    def check_model(self, name: str, number: str | None = None) -> None:
        """Raises NotFound if the name, or the version, is not the one that is served."""
        if name != self.settings.model_name:
            raise NotFound(f"unknown model {name[:80]!r}; the model here is {self.settings.model_name!r}")
        if number not in (None, self.current.number):
            raise NotFound(
                f"version {number[:80]!r} of {name!r} is not served; the version here is {self.current.number!r}"
            )

    async def check_ready(self) -> None:
        """Raises Unavailable if the victim is not ready."""
        if not await self.current.pipeline.ready():
            raise Unavailable("the model behind the gateway is not ready")
