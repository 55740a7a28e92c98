"""What is done about attacks by queries: counted, logged once, slowed down or refused, and nobody else is."""

import logging
from typing import Any

import numpy as np
import pytest
from gateway_fakes import Upstream, gateway
from service_fakes import assert_error

from services.gateway import detection
from services.gateway.accounting import Account, Budget
from services.gateway.config import GatewaySettings
from services.gateway.detection import Detector
from services.protocol.errors import AttackSuspected, Overloaded
from services.protocol.images import encode_png

pytestmark = pytest.mark.anyio


def near(count: int, seed: int = 0) -> np.ndarray:
    """Images (count,1,32,32) that differ by a step of 1/255 at a pixel each."""
    coarse = np.random.default_rng(seed).random((1, 4, 4), np.float32).repeat(8, axis=1).repeat(8, axis=2)
    images = np.repeat((coarse * 0.9)[None], count, axis=0)
    for index, image in enumerate(images):
        image.reshape(-1)[index] += 1 / 255
    return images


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def detector(clock: Clock | None = None, **settings: Any) -> Detector:
    values = {"artifact": "a", "victim_url": "http://victim", "detection_near": 5, **settings}
    return Detector(GatewaySettings(**values), clock=clock or Clock())


async def watched(one: Detector, images: np.ndarray, name: str = "someone") -> int:
    account = Account(Budget())
    await one.watch(name, account, images)
    return account.suspected


async def test_from_the_threshold_on_images_are_suspected_in_one_batch_or_many(
    caplog: pytest.LogCaptureFixture,
) -> None:
    together, apart = detector(), detector()
    with caplog.at_level(logging.WARNING):
        assert await watched(together, near(8)) == 4
        assert [await watched(apart, image[None]) for image in near(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["query attack suspected: someone sent 5 different images near one another within 0 s"] * 2


async def test_the_same_image_again_and_again_is_no_attack(caplog: pytest.LogCaptureFixture) -> None:
    one = detector()
    assert await watched(one, np.repeat(near(1), 50, axis=0)) == 0
    assert not caplog.records


async def test_many_different_images_are_no_attack() -> None:
    assert await watched(detector(), np.concatenate([near(1, seed) for seed in range(20)])) == 0


async def test_clients_are_told_apart() -> None:
    one = detector()
    images = near(8)
    assert await watched(one, images[:4], "a") == 0
    assert await watched(one, images[4:], "b") == 0
    assert await watched(one, images[4:5], "a") == 1


async def test_off_looks_at_nothing() -> None:
    one = detector(detection="off")
    assert await watched(one, near(20)) == 0


async def test_refusing_says_why_and_until_when_and_other_images_are_answered() -> None:
    clock = Clock()
    one = detector(clock, detection="refuse", detection_window_s=100.0)
    await watched(one, near(4))
    clock.now = 30.0
    account = Account(Budget())
    with pytest.raises(AttackSuspected, match="nearly the same") as refused:
        await one.watch("someone", account, near(5)[4:])
    assert refused.value.retry_after == 70.0
    assert account.suspected == 1
    assert await watched(one, near(1, seed=7)) == 0
    clock.now = 100.0
    assert await watched(one, near(6)[5:]) == 0, "the window has ended"


async def test_slowing_down_waits_and_many_who_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if seconds and len([wait for wait in waits if wait]) == 1:
            with pytest.raises(Overloaded):
                await one.watch("someone", Account(Budget()), near(12)[10:])

    monkeypatch.setattr(detection.asyncio, "sleep", sleep)
    one = detector(detection="slow", detection_delay_s=2.5, max_queue=1)
    await watched(one, near(4))
    assert not any(waits)
    assert await watched(one, near(5)[4:]) == 1
    assert [wait for wait in waits if wait] == [2.5]


async def test_only_so_many_clients_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MAX_HISTORIES", 2)
    one = detector()
    images = near(8)
    for name in ("a", "b", "a", "c"):
        await watched(one, images[:4], name)
    assert await watched(one, images[4:5], "a") == 1
    assert await watched(one, images[4:5], "b") == 0, "forgotten, as the one not heard of for longest"


def png(index: int) -> bytes:
    image = np.full((1, 8, 6), 0.5, np.float32)
    image.reshape(-1)[index] = 0.6
    return encode_png(image)


async def test_over_http_the_operator_sees_it_and_the_client_does_not() -> None:
    async with gateway(Upstream(), usage=True, detection_near=5) as http:
        answers = [
            await http.post("/predict", files={"file": png(index)}, headers={"X-API-Key": "eve"}) for index in range(8)
        ]
        await http.post("/predict", files={"file": png(9)}, headers={"X-API-Key": "alice"})
        keys = (await http.get("/queries")).json()["keys"]
    assert sorted(key["suspected"] for key in keys.values()) == [0, 4]
    assert {answer.status_code for answer in answers} == {200}
    first, last = (answer.json()["evidence"] for answer in (answers[0], answers[-1]))
    assert first == last


async def test_over_http_a_refusal_costs_no_query_and_a_dry_run_is_no_image() -> None:
    upstream = Upstream()
    async with gateway(upstream, detection="refuse", detection_near=5) as http:
        for index in range(8):
            assert (await http.post("/predict?dry_run=true", files={"file": png(index)})).status_code == 200
        for index in range(4):
            assert (await http.post("/predict", files={"file": png(index)})).status_code == 200
        before = upstream.requests
        refused = await http.post("/predict", files={"file": png(5)})
        assert_error(refused, 429, "nearly the same")
        assert int(refused.headers["Retry-After"]) > 3000
        assert upstream.requests == before
