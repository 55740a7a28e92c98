"""The asyncio client of a victim or a gateway; use it through `services.protocol.client`."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol.errors import TRANSIENT, InvalidInput, ServiceError, UpstreamInvalid
from services.protocol.mapping import Mapping, TensorOptions
from services.protocol.pool import ReplicaPool
from services.protocol.replicas import Replica, ServerPaths
from services.protocol.wires.base import Wire
from services.protocol.wires.image import OWN_ANSWER, OWN_SENDING, ImageWire, OwnImageWire
from services.protocol.wires.predict import PredictWire
from services.protocol.wires.server import ServerWire

WireName = Literal["tensor", "image"]
"""How images travel: many a request as float32 tensors, or each by itself as an 8-bit PNG."""


class AsyncVictimClient:
    """Asks one victim, at one or several URLs, in large binary requests, or image by image where it knows only images.

    A URL is our own victim's (http://host:8000, asked at /predict), that of a model of an Open Inference Protocol v2
    server (.../v2/models/NAME, whose metadata say how it is asked; they are fetched before the first request), or
    whatever `mapping` describes.

    Args:
        urls: replicas of one victim; each request goes to the one with the fewest requests outstanding.
        batch: most images a request.
        in_flight: most requests at once, over all replicas and callers.
        timeout_s: seconds without progress after which a request has timed out; connecting, and health, have 5 at most.
        patience_s: for how long overload, broken connections, 502, 503, 504 and time-outs are waited out while no
            request at all succeeds. A replica that fails rests (exponential back-off with jitter), the others are used;
            `Retry-After` prolongs the rest up to the end of patience, when the last attempt is made.
            After other failures than overload, images are sent again only where the replica's health, which costs
            nothing, does not speak against it. 0: nothing is waited for, but unless it timed out, a request moves on
            once to another replica that is not resting; and where every replica failed several times in a row, requests
            fail at once (503) while they rest, but for one on trial at a time.
        on_resend: called with the number of images before they are transmitted once more after an earlier
            transmission failed. What it raises ends the request and reaches the caller.
        wire: "tensor": Open Inference Protocol, float32 there and back. "image": each image is uploaded by itself, as
            an 8-bit PNG in a form, and JSON comes back (`services.protocol.wires.image`); `batch` has no meaning then.
        mapping: what the URLs do not tell (`services.protocol.mapping`); with its `image` the wire is that one.
        transport: in place of the network, for tests.

    Raises:
        InvalidInput: a URL is invalid, or the URLs and the wire do not go together.
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
        wire: WireName = "tensor",
        mapping: Mapping | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Opens no connection yet."""
        if isinstance(urls, str) or not urls:
            raise ValueError("urls must be a sequence with at least one URL")
        if batch < 1 or in_flight < 1 or timeout_s <= 0 or patience_s < 0:
            raise ValueError("batch, in_flight and timeout_s must be positive, patience_s not negative")
        self._mapping = mapping or Mapping()
        is_foreign = self._mapping.image is not None
        replicas = [Replica.at(url, foreign=is_foreign, health=self._mapping.health) for url in urls]
        self._wire = _wire_of(replicas, wire, self._mapping)
        self._settling = asyncio.Lock()
        self._batch = batch
        self._labels: tuple[str, ...] | None = None
        self._slots = asyncio.Semaphore(in_flight)
        self._pool = ReplicaPool(
            replicas,
            headers=self._mapping.plain_headers(),
            in_flight=in_flight,
            timeout_s=timeout_s,
            patience_s=patience_s,
            on_resend=on_resend,
            transport=transport,
        )

    @property
    def replicas(self) -> int:
        """How many replicas are known now."""
        return self._pool.replicas

    async def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The victim's scores.

        Args:
            images: (N,C,H,W), N at least 1.

        Returns:
            (N,K), or (N,K,H,W) from a segmenter; float32, finite, in the order of the images, exactly as the victim
            sent them. Only a segmenter's single plane of probabilities p is completed, to (1 - p, p).

        Raises:
            ServiceError: the victim refused, failed or could not be reached, by class; 4xx carry its own words.
            Unsupported: it is a server whose model takes something else than batches of images.
            UpstreamInvalid: it answered something else than finite scores of such a shape.
        """
        if images.ndim != 4 or not len(images):
            raise ValueError(f"expected images of shape (N,C,H,W) with N at least 1, got {images.shape}")
        images = np.asarray(images, dtype=np.float32)
        wire = await self._settled()
        size = min(self._batch, wire.largest or self._batch)
        if len(images) <= size:
            return await self._ask(wire, images)
        chunks = [images[start : start + size] for start in range(0, len(images), size)]
        tasks = [asyncio.create_task(self._ask(wire, chunk)) for chunk in chunks]
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
        """What the victim says of one image (C,H,W), in the form of this project's JSON answers; costs one query.

        Returns:
            at least `labels` (list of K str; numbers where the victim has no place for names), and `label` (str) or,
            from a segmenter, `mask` (a PNG in base64); `probabilities` (list of K float) where it has any.
        """
        wire = await self._settled()
        async with self._slots:
            body, headers = wire.encode_question(image)
            response = await self._pool.post(body, headers, count=1)
        return wire.read_description(response, image.shape)

    async def ready(self) -> bool:
        """Whether any replica says that it is ready."""
        return await self._pool.ready()

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._pool.aclose()

    async def __aenter__(self) -> Self:
        """Nothing to prepare."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all connections."""
        await self.aclose()

    async def _ask(self, wire: Wire, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The scores of as many images as one request may hold."""
        async with self._slots:  # also around the encoding, or every request of a large call would be in memory at once
            body, headers = wire.encode(images)
            response = await self._pool.post(body, headers, count=len(images))
        told = wire.read(response, images.shape)
        if told.labels is not None:
            self._labels = self._labels or told.labels
            if told.labels != self._labels:
                raise UpstreamInvalid("the victim changed its classes, or their order, between two requests")
        return told.scores

    async def _settled(self) -> Wire:
        """The wire; that to a server is known once its metadata are."""
        if self._wire is None:
            async with self._settling:
                self._wire = self._wire or await self._learn_wire()
        return self._wire

    async def _learn_wire(self) -> ServerWire:
        response = await self._pool.get(lambda replica: _server_of(replica).model)
        try:
            server = _json(await self._pool.get(lambda replica: _server_of(replica).server))
        except TRANSIENT:
            raise
        except ServiceError:  # it need not have any
            server = None
        options = self._mapping.tensor or TensorOptions()
        return ServerWire.from_metadata(str(response.url), _json(response), server, options, self._mapping.labels)


def _wire_of(replicas: Sequence[Replica], name: WireName, mapping: Mapping) -> Wire | None:
    """The wire to these replicas; None: to a server, whose metadata have to be asked for.

    Raises:
        InvalidInput: they are no replicas of one victim, or cannot be spoken to by such a wire.
    """
    if mapping.image is not None and mapping.answer is not None:
        return ImageWire(mapping.image, mapping.answer, mapping.labels)
    if len({replica.server is None for replica in replicas}) > 1:
        raise InvalidInput("some URLs name a model of a server (/v2/models/NAME) and others do not: replicas are alike")
    if replicas[0].server is not None:
        if name == "image":
            raise InvalidInput(f"{replicas[0].url} takes tensors, not images: leave the wire at 'tensor'")
        return None
    if mapping.tensor is not None:
        raise InvalidInput(f"{replicas[0].url} names no model of a server (/v2/models/NAME), which [tensor] is about")
    if name == "tensor":
        return PredictWire(mapping.labels)
    return ImageWire(OWN_SENDING, OWN_ANSWER, mapping.labels) if mapping.labels else OwnImageWire()


def _server_of(replica: Replica) -> ServerPaths:
    assert replica.server is not None  # `_wire_of` has seen to that
    return replica.server


def _json(response: httpx.Response) -> object:
    """What it says; None where that is no JSON."""
    try:
        return response.json()
    except ValueError:
        return None
