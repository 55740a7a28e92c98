"""Metrics: what Prometheus is told of requests, batches, votes and accounts."""

import asyncio
import socket
import urllib.request

import httpx
import numpy as np
import pytest
from gateway_fakes import WHITE, Upstream, gateway, images, segmenting
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from service_fakes import tensor_request

from services.gateway import state as module
from services.gateway.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """Those of the gateway that the test starts."""
    made = Metrics()
    monkeypatch.setattr(module, "Metrics", lambda: made)
    return made


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by name and the values of their labels, in the order of the labels' names."""
    return parsed(generate_latest(metrics.registry).decode())


def parsed(text: str) -> dict[tuple[str, ...], float]:
    told = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels[name] for name in sorted(sample.labels))
            told[sample.name.removeprefix("zo_gateway_"), *labels] = sample.value
    return told


async def test_requests_are_counted_by_route_and_status_and_paths_that_are_not_there_tell_nothing(
    metrics: Metrics,
) -> None:
    async with gateway(Upstream()) as http:
        for _ in range(3):
            assert (await http.post("/predict", files={"file": WHITE})).status_code == 200
        await http.post("/predict", files={"file": b"no image"})
        await http.get("/patient/Jane-Doe")
        await http.get("/v2/models/another/ready")
    told = read(metrics)
    assert told["requests_total", "/predict", "200"] == 3
    assert told["requests_total", "/predict", "415"] == 1
    assert told["requests_total", "unknown", "404"] == 1
    assert told["requests_total", "/v2/models/{name}/ready", "404"] == 1
    assert told["request_seconds_count", "/predict"] == 4
    assert "Jane" not in generate_latest(metrics.registry).decode()


async def test_batches_and_the_victims_time_are_told_apart(metrics: Metrics) -> None:
    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(0.06)
            return await super().handle_async_request(request)

    async with gateway(Slow()) as http:
        await http.post("/predict", **tensor_request(images(5)))
    told = read(metrics)
    assert told["batch_images_sum",] == 5
    assert told["sanitize_seconds_count",] == told["upstream_seconds_count",] == 1
    assert told["upstream_seconds_sum",] >= 0.06 > told["sanitize_seconds_sum",]


async def test_a_victim_that_fails_is_timed_too(metrics: Metrics) -> None:
    async with gateway(Upstream(lambda _request: httpx.Response(503))) as http:
        await http.post("/predict", files={"file": WHITE})
    assert read(metrics)["upstream_seconds_count",] == 1
    assert ("images_total", "sanitize") not in read(metrics)


async def test_votes_and_abstentions_are_counted_by_mode(metrics: Metrics) -> None:
    modes = {"modes": "sanitize,smooth,certify", "smooth_n": 40, "certify_n0": 10, "certify_n": 50}
    grey = np.full((1, 1, 8, 6), 0.5, np.float32)
    async with gateway(Upstream(), **modes, trained=1.0, alpha=1e-6) as http:
        await http.post("/predict", **tensor_request(images(2)))
        undecided = await http.post("/predict?mode=smooth", **tensor_request(grey))
        assert undecided.status_code == 200
        await http.post("/predict?mode=certify", files={"file": WHITE})
    told = read(metrics)
    assert (told["images_total", "sanitize"], told["votes_total", "sanitize"]) == (2, 0)
    assert (told["images_total", "smooth"], told["votes_total", "smooth"]) == (1, 40)
    assert (told["images_total", "certify"], told["votes_total", "certify"]) == (1, 60)
    assert told["abstained_total", "smooth"] == 1
    assert told["abstained_total", "sanitize"] == 0


async def test_of_masks_the_share_of_pixels_abstains(metrics: Metrics) -> None:
    half = np.full((1, 8, 6), 0.05, np.float32)
    half[:, :4] = 0.5  # inverted, these are undecided under noise, the others are not
    async with gateway(Upstream(segmenting), modes="smooth", smooth_n=40, trained=0.05, alpha=1e-9) as http:
        await http.post("/predict", **tensor_request(half[None]))
    assert 0.4 <= read(metrics)["abstained_total", "smooth"] <= 0.5


async def test_accounts_queues_and_the_version_are_read_when_asked(metrics: Metrics) -> None:
    async with gateway(Upstream(), detection_near=2, shadow=True) as http:
        for level in (0.5, 0.6):
            request = tensor_request(np.full((1, 1, 8, 6), 0.5, np.float32) + level / 255)
            request["headers"]["X-API-Key"] = "k"
            await http.post("/predict", **request)
        told = read(metrics)
    (key,) = {name[1] for name in told if name[0] == "suspected_total" and name[1].startswith("sha256:")}
    assert told["victim_queries_total", key, "sanitize"] == 2
    assert told["victim_queries_total", key, "shadow"] == 2
    assert told["suspected_total", key] == 1
    assert told["images_in_work", "images"] == told["images_in_work", "copies"] == 0
    assert told["artifact", "sha256-abc", "1"] == 1


async def test_images_in_work_are_seen_while_they_are(metrics: Metrics) -> None:
    class Waits(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(read(metrics)["images_in_work", "images"])
            return await super().handle_async_request(request)

    seen: list[float] = []
    async with gateway(Waits()) as http:
        await http.post("/predict", **tensor_request(images(7)))
    assert seen == [7]


async def test_they_are_served_at_a_port_of_their_own_and_nowhere_else() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with gateway(Upstream(), metrics_port=port) as http:
        await http.post("/predict", files={"file": WHITE})
        assert (await http.get("/metrics")).status_code == 404
        url = f"http://127.0.0.1:{port}/metrics"
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())
        assert parsed(body.decode())["requests_total", "/predict", "200"] == 1
    with pytest.raises(OSError):  # noqa: PT011 - nobody listens any more
        await asyncio.to_thread(urllib.request.urlopen, url, timeout=5)
