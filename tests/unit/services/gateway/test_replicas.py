"""Several replicas behind one gateway: all of them are at work, and one image's fault is no other one's."""

import asyncio
import time
from collections import Counter

import httpx
import numpy as np
import pytest
from gateway_fakes import Answers, Upstream, gateway, images, scored, victim
from service_fakes import assert_error, scores_of, tensor_request

from services.protocol import oip

pytestmark = pytest.mark.anyio

NAMES = ("http://a", "http://b", "http://c", "http://d")


class Held(Upstream):
    """Answers nothing until it is released; knows what is under way to which replica."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: Counter[str] = Counter()
        self.released = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.under_way[request.url.host] += 1
        await self.released.wait()
        return await super().handle_async_request(request)


@pytest.mark.parametrize(("replicas", "under_way"), [(1, 2), (2, 4), (4, 8)])
async def test_requests_under_way_grow_with_the_replicas(replicas: int, under_way: int) -> None:
    upstream = Held()
    batch = images(64)
    async with gateway(upstream, victim_url=",".join(NAMES[:replicas]), in_flight=16) as http:
        tasks = [asyncio.create_task(http.post("/predict", **tensor_request(batch[[number]]))) for number in range(64)]
        while upstream.under_way.total() < under_way:
            await asyncio.sleep(0.001)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert list(upstream.under_way.values()) == [2] * replicas
        upstream.released.set()
        answers = [scores_of(await task) for task in tasks]
    assert np.array_equal(np.concatenate(answers), victim(1 - batch))


async def test_no_more_requests_are_under_way_than_the_setting_allows() -> None:
    upstream = Held()
    async with gateway(upstream, victim_url=",".join(NAMES), in_flight=3) as http:
        tasks = [asyncio.create_task(http.post("/predict", **tensor_request(images(1)))) for _ in range(32)]
        while upstream.under_way.total() < 3:
            await asyncio.sleep(0.001)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert upstream.under_way.total() == 3
        upstream.released.set()
        assert {(await task).status_code for task in tasks} == {200}


class Sleeping(httpx.AsyncBaseTransport):
    """Replicas that answer one request at a time, and sleep for each image."""

    def __init__(self) -> None:
        self.turns = {url.removeprefix("http://"): asyncio.Lock() for url in NAMES}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asked = oip.decode_request(await request.aread(), oip.header_length(request.headers[oip.HEADER]))
        array = asked.inputs[0].array
        async with self.turns[request.url.host]:
            await asyncio.sleep(0.02 * len(array))
        return scored(victim(array))


async def test_two_replicas_answer_nearly_twice_as_much_as_one() -> None:
    async def seconds(replicas: int) -> float:
        async with gateway(Sleeping(), victim_url=",".join(NAMES[:replicas])) as http:
            asked = [tensor_request(images(1)) for _ in range(160)]

            async def client(number: int) -> None:
                for request in asked[number::32]:
                    scores_of(await http.post("/predict", **request))

            begun = time.perf_counter()
            await asyncio.gather(*(client(number) for number in range(32)))
            return time.perf_counter() - begun

    ratio = await seconds(1) / await seconds(2)
    assert ratio >= 1.8


async def test_an_image_that_cannot_be_sanitized_fails_alone() -> None:
    upstream = Upstream()
    batch = images(16)
    batch[5] = 3e38  # finite, and too large for what the sanitizer makes of it
    async with gateway(upstream, Answers(lambda sent: (sent * 10 - 5).sigmoid() + (sent * 10).mean() * 0)) as http:
        responses = await asyncio.gather(*(http.post("/predict", **tensor_request(one[None])) for one in batch))
    assert_error(responses.pop(5), 500)
    assert {response.status_code for response in responses} == {200}
    assert len(upstream.received) == 15


async def test_an_image_that_the_victim_refuses_fails_alone_and_what_is_asked_again_is_booked() -> None:
    def refuses(request: httpx.Request) -> httpx.Response:
        asked = oip.decode_request(request.content, oip.header_length(request.headers[oip.HEADER])).inputs[0].array
        return httpx.Response(400, json={"error": "too bright"}) if (asked == 1).any() else scored(victim(asked))

    upstream = Upstream(refuses)
    batch = images(16) * 0.5 + 0.25
    batch[5] = 0  # white, once it is sanitized
    async with gateway(upstream, usage=True) as http:
        responses = await asyncio.gather(*(http.post("/predict", **tensor_request(one[None])) for one in batch))
        told = (await http.get("/queries")).json()
    assert_error(responses.pop(5), 502)
    assert [scores_of(response).tolist() for response in responses] == [
        scores.tolist() for scores in victim(1 - np.delete(batch, 5, axis=0))[:, None]
    ]
    assert told["keys"]["anonymous"]["queries"] == {"sanitize": 16}
    assert told["gateway"].get("resent", 0) == len(upstream.received) - 16
