import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from gateway_fakes import Upstream, gateway, images, victim
from service_fakes import assert_error, tensor_request

from services.protocol import deadlines, oip
from services.protocol.deadlines import HEADER

pytestmark = pytest.mark.anyio


class Hangs(Upstream):
    """A victim that takes a question and never answers; says when it was left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.left_alone = asyncio.Event(), asyncio.Event()
        self.headers: httpx.Headers = httpx.Headers()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.headers = request.headers
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left_alone.set()
        raise AssertionError


def patient(seconds: str) -> dict[str, Any]:
    """A question whose client waits so long."""
    question = tensor_request(images(2))
    return {**question, "headers": {**question["headers"], HEADER: seconds}}


def microseconds(value: object) -> dict[str, Any]:
    """A question whose client waits so long, in the protocol's own way."""
    entry = {"name": "x", "shape": [1, 1, 8, 6], "datatype": "FP32", "data": [0.5] * 48}
    return {"json": {"inputs": [entry], "parameters": {"timeout": value}}}


PATIENCE_S = (0.2, 2.0, 20.0)
"""On a busy machine the shorter ones may be over before the victim is asked: then the next is tried."""


@pytest.mark.parametrize("kind", ["header", "parameter", "own"])
async def test_the_nearest_deadline_ends_the_work_and_frees_it(kind: str) -> None:
    for seconds in PATIENCE_S:
        upstream = Hangs()
        asked = {
            "header": patient(str(seconds)),
            "parameter": microseconds(int(seconds * 1e6)),
            "own": tensor_request(images(2)),
        }[kind]
        own = seconds if kind == "own" else 60.0
        async with gateway(upstream, deadline_s=own, max_queue=2, usage=True) as http:
            assert_error(await http.post("/predict", **asked), 504, "time that this request has is over")
            first, first_left_alone = upstream.asked.is_set(), upstream.left_alone.is_set()
            upstream.asked.clear()
            # No image is in work any more: a request that the queue holds only when it is empty is let in again.
            assert_error(await http.post("/predict", **patient(str(seconds))), 504, "over")
            if first and upstream.asked.is_set():
                assert first_left_alone
                assert (await http.get("/queries")).json()["queries"]["sanitize"] >= 3, "what was sent stays counted"
                return
    pytest.fail("the victim was never asked")


@pytest.mark.parametrize("kind", ["header", "parameter"])
async def test_what_is_left_travels_to_the_victim(kind: str) -> None:
    for seconds in PATIENCE_S:
        upstream = Hangs()
        async with gateway(upstream) as http:
            question = patient(str(seconds)) if kind == "header" else microseconds(int(seconds * 1e6))
            await http.post("/predict", **question)
        if upstream.asked.is_set():
            assert 0 < float(upstream.headers[HEADER]) <= seconds
            return
    pytest.fail("the victim was never asked")


@pytest.mark.parametrize("seconds", ["", "0", "-1", "1e3", "soon", "٣", "nan", "1" * 12])
async def test_what_is_no_time_is_refused(seconds: str) -> None:
    async with gateway(Upstream()) as http:
        question = patient("1")
        question["headers"] = httpx.Headers([(k, v) for k, v in question["headers"].items() if k != HEADER])
        question["headers"] = [*question["headers"].raw, (HEADER.encode(), seconds.encode())]
        assert_error(await http.post("/predict", **question), 400, HEADER)


@pytest.mark.parametrize("value", [-1, 1.5, "5", True, 2**63])
async def test_what_is_no_number_of_microseconds_is_refused(value: object) -> None:
    async with gateway(Upstream()) as http:
        assert_error(await http.post("/predict", **microseconds(value)), 400, "microseconds")


async def test_zero_microseconds_are_no_bound() -> None:
    async with gateway(Upstream()) as http:
        assert (await http.post("/predict", **microseconds(0))).status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for_longer() -> None:
    async def trickling() -> AsyncIterator[bytes]:
        yield b"\x89PNG"
        await asyncio.sleep(600)

    async with gateway(Upstream(), deadline_s=0.2) as http:
        headers = {"Content-Type": "image/png"}
        assert_error(await http.post("/predict", content=trickling(), headers=headers), 504, "over")


async def test_a_client_that_hangs_up_frees_its_work() -> None:
    upstream = Hangs()
    async with gateway(upstream, max_queue=2) as http:
        asking = asyncio.create_task(http.post("/predict", **tensor_request(images(2))))
        await upstream.asked.wait()
        asking.cancel()
        await asyncio.wait_for(upstream.left_alone.wait(), 30)


async def test_a_deadline_is_never_put_off_and_belongs_to_one_request() -> None:
    async def one(seconds: float) -> float:
        deadlines.narrow(seconds)
        deadlines.narrow(seconds + 100)
        await asyncio.sleep(0)
        return deadlines.left_s()

    left = await asyncio.gather(one(1), one(50))
    assert left[0] <= 1 < 40 < left[1] <= 50
    assert deadlines.left_s() == float("inf")
    assert deadlines.travelling() == {}


async def test_answers_in_time_are_whole() -> None:
    async with gateway(Upstream()) as http:
        question = tensor_request(np.full((3, 1, 8, 6), 0.25, np.float32))
        response = await http.post("/predict", **{**question, "headers": {**question["headers"], HEADER: "60.5"}})
        told = oip.decode_response(response.content, oip.header_length(response.headers[oip.HEADER]))
        assert np.array_equal(told["probabilities"], victim(np.full((3, 1, 8, 6), 0.75, np.float32)))
