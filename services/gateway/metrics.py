"""Prometheus metrics of the gateway, on a port of the operator's own that clients do not see.

Names begin with `zo_gateway_`. Client keys have the same names as in `GET /queries`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.admission import Admission
from services.gateway.accounting import Accounts
from services.gateway.config import Mode
from services.upstream import Array

PREFIX: Final = "zo_gateway"

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters and histograms, exported from their own `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace=PREFIX, registry=self.registry)
        histogram = partial(Histogram, namespace=PREFIX, registry=self.registry)
        self._requests = counter("requests", "Requests, by route and status.", ("route", "status"))
        self._seconds = histogram(
            "request_seconds", "Seconds from a request to the end of its answer.", ("route",), buckets=_SECONDS
        )
        self._batch = histogram("batch_images", "Images in one batch of the sanitizer.", buckets=_IMAGES)
        self._sanitize = histogram("sanitize_seconds", "Seconds of one batch in the sanitizer.", buckets=_SECONDS)
        self._upstream = histogram("upstream_seconds", "Seconds of one batch at the victim.", buckets=_SECONDS)
        self._images = counter("images", "Images answered, by mode.", ("mode",))
        self._votes = counter("votes", "Noisy copies that voted, by mode.", ("mode",))
        self._abstained = counter(
            "abstained", "Images without an answer, by mode; of masks, the share of their pixels.", ("mode",)
        )

    def watch(self, accounts: Accounts, queues: dict[str, Admission], version: Callable[[], tuple[str, str]]) -> None:
        """Exports what is counted elsewhere: accounts, images in work by queue, and the version (number, id)."""
        self.registry.register(_Elsewhere(accounts, queues, version))

    def sanitizing(self, run: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """Wraps the batcher's function to count and time its batches."""

        def timed(images: Array) -> Array:
            self._batch.observe(len(images))
            with self._sanitize.time():
                return run(images)

        return timed

    @contextmanager
    def upstream(self) -> Iterator[None]:
        """Times the victim, whether it answers or fails."""
        with self._upstream.time():
            yield

    def mean_upstream_ms(self) -> float | None:
        """Mean milliseconds of a batch at the victim since the start; None: there was none."""
        samples = {
            one.name.rpartition("_")[2]: one.value for family in self._upstream.collect() for one in family.samples
        }
        return 1000 * samples["sum"] / samples["count"] if samples["count"] else None

    def answered(self, mode: Mode, images: int, votes: int, abstained: float) -> None:
        """Counts the answer to a request; `abstained` images have none (of masks, the sum of abstaining shares)."""
        self._images.labels(mode).inc(images)
        self._votes.labels(mode).inc(votes)
        self._abstained.labels(mode).inc(abstained)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    @contextmanager
    def serving(self, host: str, port: int | None) -> Iterator[None]:
        """Serves the metrics while the context lasts; None: nowhere. Raises OSError if the port cannot be bound."""
        if port is None:
            yield
            return
        server, thread = start_http_server(port, addr=host, registry=self.registry)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Elsewhere(Collector):
    """Exports what other parts of the gateway count."""

    def __init__(
        self, accounts: Accounts, queues: dict[str, Admission], version: Callable[[], tuple[str, str]]
    ) -> None:
        self._accounts, self._queues, self._version = accounts, queues, version

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is now."""
        number, identity = self._version()
        info = GaugeMetricFamily(f"{PREFIX}_artifact", "1 for the version that answers.", labels=("version", "id"))
        info.add_metric((number, identity), 1)
        yield info
        waiting = GaugeMetricFamily(f"{PREFIX}_images_in_work", "Images accepted and not answered.", labels=("queue",))
        for name, queue in self._queues.items():
            waiting.add_metric((name,), queue.images)
        yield waiting
        told = self._accounts.snapshot()
        queries = CounterMetricFamily(f"{PREFIX}_victim_queries", "Queries to the victim.", labels=("key", "purpose"))
        refused = CounterMetricFamily(f"{PREFIX}_refused", "Requests that no budget held.", labels=("key",))
        suspected = CounterMetricFamily(f"{PREFIX}_suspected", "Images suspected of an attack.", labels=("key",))
        shadow = CounterMetricFamily(f"{PREFIX}_shadow", "Raw answers compared, by outcome.", labels=("key", "outcome"))
        for key, one in {**told["keys"], "gateway": {"queries": told["gateway"]}}.items():
            for purpose, count in one["queries"].items():
                queries.add_metric((key, purpose), count)
            for outcome, count in one.get("shadow", {}).items():
                shadow.add_metric((key, outcome), count)
            refused.add_metric((key,), one.get("refused", 0))
            suspected.add_metric((key,), one.get("suspected", 0))
        yield from (queries, refused, suspected, shadow)
