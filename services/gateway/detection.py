"""Detects query attacks as they happen: many different images of one client that are near one another.

Findings are counted (`GET /queries`) and logged once per group of images; optionally the client is also slowed down or
refused. Answers do not reveal a suspicion, except by `refuse`, as attackers could use them to find the threshold.

Attackers who spread over many keys, wait for windows to end or move images by more than the radius between queries
(Feng et al. 2023, OARS) are detected late or never: this makes attacks more expensive, not impossible.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import anyio.to_thread

from services.admission import Admission
from services.gateway.accounting import Account
from services.gateway.config import GatewaySettings
from services.gateway.fingerprints import Digests, Fingerprints, History, digests, fingerprints
from services.protocol.errors import AttackSuspected
from services.upstream import Array

logger = logging.getLogger(__name__)

MAX_HISTORIES: Final = 1000
"""Clients whose images are remembered, some 80 KB each; the one not heard of for longest is forgotten."""


class Detector:
    """Watches what clients send; `clock` gives seconds, from any start."""

    def __init__(self, settings: GatewaySettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._histories: OrderedDict[str, History] = OrderedDict()
        self._waiting = Admission(settings.max_queue)

    async def watch(self, name: str, account: Account, images: Array) -> None:
        """Checks a request's images (N,C,H,W) before the work on them begins, and delays the request if configured.

        Suspected images are counted on `account`; `name` is the client's name in the log.

        Raises:
            AttackSuspected: an image is suspected and detection is set to refuse.
            Overloaded: an image is suspected and too many requests are being delayed already.
        """
        if self._settings.detection == "off":
            return
        history = self._history(name)
        suspected, ends_in_s = 0, 0.0
        # One image is looked at sooner than a thread could be asked to.
        looked_at = _looked_at(images) if len(images) == 1 else await anyio.to_thread.run_sync(_looked_at, images)
        for fingerprint, digest in zip(*looked_at, strict=True):
            met = history.meet(fingerprint, digest, self._clock())
            await asyncio.sleep(0)  # a large batch shall not keep others waiting
            if met.near < self._settings.detection_near:
                continue
            suspected += 1
            ends_in_s = max(ends_in_s, met.ends_in_s)
            if met.is_new and met.near == self._settings.detection_near:
                logger.warning(
                    "query attack suspected: %s sent %d different images near one another within %.0f s",
                    *(name, met.near, self._settings.detection_window_s - met.ends_in_s),
                )
        account.suspected += suspected
        if suspected:
            await self._react(len(images), ends_in_s)

    async def _react(self, images: int, ends_in_s: float) -> None:
        if self._settings.detection == "refuse":
            raise AttackSuspected(
                f"this key has sent {self._settings.detection_near} or more different images that are nearly the same, "
                "as attacks by queries do; other images are answered",
                retry_after=ends_in_s,
            )
        if self._settings.detection == "slow":
            with self._waiting.admit(images):
                await asyncio.sleep(self._settings.detection_delay_s)

    def _history(self, name: str) -> History:
        history = self._histories.get(name)
        if history is None:
            history = History(self._settings.detection_radius, self._settings.detection_window_s)
            self._histories[name] = history
        self._histories.move_to_end(name)
        if len(self._histories) > MAX_HISTORIES:
            self._histories.popitem(last=False)
        return history


def _looked_at(images: Array) -> tuple[Fingerprints, Digests]:
    return fingerprints(images), digests(images)
