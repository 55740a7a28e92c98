"""The one HTTP client of a victim or a gateway: `AsyncVictimClient` for asyncio, `HTTPVictim` for everyone else."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import httpx
import torch

from services.protocol.async_client import AsyncVictimClient, WireName
from services.protocol.mapping import Mapping

__all__ = ["AsyncVictimClient", "Endpoint", "HTTPVictim", "WireName"]

_T = TypeVar("_T")


@runtime_checkable
class Endpoint(Protocol):
    """A victim, or a gateway in front of one: `HTTPVictim`, or the like of it in process."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N,C,H,W) float32 in [0,1] -> (N,K) or (N,K,H,W) float32 scores."""

    def describe(self, image: torch.Tensor) -> dict[str, object]:
        """One image (C,H,W) -> the JSON answer."""

    def ready(self) -> bool:
        """Whether something answers there and can serve."""


class HTTPVictim:
    """`AsyncVictimClient` for code without an event loop: its own loop runs in a daemon thread until `close`.

    May be called from several threads. The arguments are those of `AsyncVictimClient`; `on_resend`, which may be set
    later, is called in the loop's thread, while the call that it belongs to waits.
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
        """Starts the thread; opens no connection yet."""
        self.on_resend = on_resend
        self._client = AsyncVictimClient(
            urls,
            batch=batch,
            in_flight=in_flight,
            timeout_s=timeout_s,
            patience_s=patience_s,
            on_resend=self._resend,
            wire=wire,
            mapping=mapping,
            transport=transport,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http-victim", daemon=True)
        self._thread.start()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The victim's scores.

        Args:
            images: (N,C,H,W), on any device.

        Returns:
            (N,K), or (N,K,H,W) from a segmenter; float32, finite, on the device of the images, without a gradient.

        Raises:
            ServiceError: as `AsyncVictimClient.infer`.
        """
        scores = self._run(self._client.infer(_to_numpy(images)))
        return torch.from_numpy(scores).to(images.device)

    def describe(self, image: torch.Tensor) -> dict[str, object]:
        """What the victim says of one image (C,H,W), as `AsyncVictimClient.describe`."""
        return self._run(self._client.describe(_to_numpy(image)))

    def ready(self) -> bool:
        """Whether any replica says that it is ready."""
        return self._run(self._client.ready())

    def close(self) -> None:
        """Closes all connections and ends the thread; a second time does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        """Nothing to prepare."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all connections and ends the thread."""
        self.close()

    def _resend(self, images: int) -> None:
        if self.on_resend is not None:
            self.on_resend(images)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this victim's client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C: nothing may go on sending after the caller has left
            future.cancel()
            raise


def _to_numpy(images: torch.Tensor) -> Any:
    return images.detach().to("cpu", torch.float32).numpy()
