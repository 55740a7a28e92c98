import asyncio
import gc
import inspect
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from services.protocol import oip, pool, replicas
from services.protocol.client import AsyncVictimClient, HTTPVictim
from services.protocol.errors import (
    CircuitOpen,
    InvalidInput,
    NotFound,
    Overloaded,
    ServiceError,
    TooLarge,
    Unavailable,
    UpstreamInvalid,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from services.protocol.images import decode_image

URL = "http://victim:8000"
Answer = Callable[[], httpx.Response]
Handler = Callable[[httpx.Request], httpx.Response] | Callable[[httpx.Request], Awaitable[httpx.Response]]


@pytest.fixture(autouse=True)
def _hardly_any_back_off_and_no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(pool.random, "random", lambda: 0.0)  # of equal replicas the first is asked


class Clock:
    """Time that passes only while the client sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        self._sleep = asyncio.sleep

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await self._sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The client's time; its back-off is a second at first and has no jitter."""
    clock = Clock()
    monkeypatch.setattr(pool, "time", clock)
    monkeypatch.setattr(pool.asyncio, "sleep", clock.sleep)
    monkeypatch.setattr(replicas, "BACKOFF_FIRST_S", 1.0)
    monkeypatch.setattr(replicas.random, "uniform", lambda _low, high: high)
    return clock


def images(count: int) -> np.ndarray:
    """Images (count,1,2,2), each filled with its own number."""
    return np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 1, 2, 2))


def received(request: httpx.Request) -> np.ndarray:
    decoded = oip.decode_request(request.content, oip.header_length(request.headers.get(oip.HEADER)))
    return decoded.inputs[0].array


def scored(scores: np.ndarray, name: str = "probabilities", binary: bool = True) -> httpx.Response:
    body, headers = oip.encode_response([(oip.Tensor(name, scores), binary)], model_name="m", model_version="1")
    return httpx.Response(200, content=body, headers=headers)


def good(request: httpx.Request) -> httpx.Response:
    """Scores (n, 1 - n) for the image that is filled with n; health is ready."""
    if request.method == "GET":
        return httpx.Response(200)
    number = received(request)[:, 0, 0, :1]
    return scored(np.concatenate([number, 1 - number], axis=1))


def client(handler: Handler, *urls: str, **options: Any) -> AsyncVictimClient:
    return AsyncVictimClient(urls or [URL], transport=httpx.MockTransport(handler), **options)


def failing_first(times: int, failure: Callable[[], httpx.Response]) -> Callable[[httpx.Request], httpx.Response]:
    """A victim that is ready, but fails for the first transmissions."""
    left = times

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal left
        left -= request.method == "POST"
        return failure() if left >= 0 and request.method == "POST" else good(request)

    return handler


def throws(error: Exception) -> httpx.Response:
    raise error


FAILURES: dict[str, tuple[Answer, type[ServiceError]]] = {
    "refused": (lambda: throws(httpx.ConnectError("refused")), UpstreamUnreachable),
    "connect timeout": (lambda: throws(httpx.ConnectTimeout("slow")), UpstreamUnreachable),
    "broken": (lambda: throws(httpx.ReadError("reset")), UpstreamUnreachable),
    "no answer": (lambda: throws(httpx.RemoteProtocolError("gone")), UpstreamUnreachable),
    "broken while it was made": (lambda: throws(AttributeError("getpeername")), UpstreamUnreachable),
    "read timeout": (lambda: throws(httpx.ReadTimeout("slow")), UpstreamTimeout),
    "429": (lambda: httpx.Response(429, json={"error": "busy"}), Overloaded),
    "502": (lambda: httpx.Response(502), UpstreamUnreachable),
    "503": (lambda: httpx.Response(503), Unavailable),
    "504": (lambda: httpx.Response(504), UpstreamTimeout),
}


@pytest.mark.anyio
async def test_batches_keep_their_order_over_urls_and_in_flight() -> None:
    rng = np.random.default_rng(0)
    hosts: set[str] = set()
    now = most = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        hosts.add(request.url.host)
        await asyncio.sleep(float(rng.uniform(0, 0.005)))
        now -= 1
        return good(request)

    async with client(handler, "http://a", "http://b", "http://c", batch=7, in_flight=5) as victim:
        scores = await victim.infer(images(100))
    assert scores.dtype == np.float32
    assert scores[:, 0].tolist() == list(range(100))
    assert hosts == {"a", "b", "c"}
    assert most == 5


@pytest.mark.anyio
async def test_tensors_travel_unrounded_in_binary() -> None:
    sent = np.random.default_rng(0).standard_normal((3, 1, 4, 4)).astype(np.float32)

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["Content-Type"] == "application/octet-stream"
        assert np.array_equal(received(request), sent)
        return scored(sent.reshape(3, -1))

    async with client(handler) as victim:
        assert np.array_equal(await victim.infer(sent), sent.reshape(3, -1))
        assert np.array_equal(await victim.infer(np.asfortranarray(sent)), sent.reshape(3, -1))


@pytest.mark.parametrize(
    ("url", "asked", "health"),
    [
        ("http://h:1", "http://h:1/predict", "http://h:1/v2/health/ready"),
        ("https://h/", "https://h/predict", "https://h/v2/health/ready"),
        ("http://h/predict", "http://h/predict", "http://h/v2/health/ready"),
        ("http://h/a/score?key=1", "http://h/a/score?key=1", "http://h/a/score/v2/health/ready"),
        ("http://h/v2/models", "http://h/v2/models", "http://h/v2/health/ready"),
    ],
)
@pytest.mark.anyio
async def test_a_url_with_a_path_is_used_as_it_is(url: str, asked: str, health: str) -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return good(request) if request.method == "POST" else httpx.Response(200)

    async with client(handler, url) as victim:
        await victim.infer(images(1))
        assert await victim.ready()
    assert seen == [asked, health]


@pytest.mark.parametrize("url", ["", "h:8000", "ftp://h", "http://", "http://h:99999999", "localhost"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="no URL"):
        AsyncVictimClient([url])


def test_arguments_are_checked() -> None:
    for urls in ([], URL):
        with pytest.raises(ValueError, match="urls"):
            AsyncVictimClient(urls)
    for options in ({"batch": 0}, {"in_flight": 0}, {"timeout_s": 0.0}, {"patience_s": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            AsyncVictimClient([URL], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 2, 2), (0, 1, 2, 2)])
@pytest.mark.anyio
async def test_images_are_a_batch(shape: tuple[int, ...]) -> None:
    async with client(good) as victim:
        with pytest.raises(ValueError, match="shape"):
            await victim.infer(np.zeros(shape, np.float32))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.anyio
async def test_without_patience_the_first_failure_is_raised_by_its_class(failure: str) -> None:
    fails, kind = FAILURES[failure]
    async with client(failing_first(1, fails)) as victim:
        with pytest.raises(kind) as caught:
            await victim.infer(images(2))
        assert type(caught.value) is kind
        assert (await victim.infer(images(2))).shape == (2, 2)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.anyio
async def test_with_patience_failures_are_waited_out_and_resends_counted(failure: str) -> None:
    resent: list[int] = []
    fails, _ = FAILURES[failure]
    async with client(failing_first(3, fails), patience_s=30, on_resend=resent.append) as victim:
        assert (await victim.infer(images(5)))[:, 0].tolist() == [0, 1, 2, 3, 4]
    was_sent = failure not in ("refused", "connect timeout")
    assert resent == ([5, 5, 5] if was_sent else [])


@pytest.mark.anyio
async def test_a_refused_connection_in_between_is_not_paid_for() -> None:
    resent: list[int] = []
    failures = iter([httpx.ReadError("reset"), httpx.ConnectError("refused"), httpx.ConnectError("refused")])

    def handler(request: httpx.Request) -> httpx.Response:
        error = next(failures, None) if request.method == "POST" else None
        return good(request) if error is None else throws(error)

    async with client(handler, patience_s=30, on_resend=resent.append) as victim:
        await victim.infer(images(5))
    assert resent == [5]


@pytest.mark.anyio
async def test_patience_ends_when_nothing_succeeds(clock: Clock) -> None:
    methods: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        methods.append(request.method)
        return throws(httpx.ConnectError("refused"))

    async with client(handler, patience_s=10) as victim:
        with pytest.raises(UpstreamUnreachable, match="refused"):
            await victim.infer(images(1))
    assert methods == ["POST", "GET", "GET", "GET", "GET"]
    assert clock.pauses == [1, 2, 4, 3]


class Victim:
    """A victim that answers /predict and health from two lists, then well, and notes what it is asked."""

    def __init__(self, predict: Sequence[Answer] = (), health: Sequence[Answer] = ()) -> None:
        self.answers = {"POST": list(predict), "GET": list(health)}
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.method)
        answers = self.answers[request.method]
        return answers.pop(0)() if answers else good(request)


def status(number: int) -> Answer:
    return lambda: httpx.Response(number)


@pytest.mark.parametrize("failure", sorted(FAILURES.keys() - {"429"}))
@pytest.mark.anyio
async def test_a_victim_that_is_away_is_polled_free_of_charge(failure: str, clock: Clock) -> None:
    resent: list[int] = []
    away = [status(503), FAILURES["refused"][0], status(502), FAILURES["read timeout"][0], status(504)]
    handler = Victim([FAILURES[failure][0]], away)
    async with client(handler, patience_s=60, on_resend=resent.append) as victim:
        assert len(await victim.infer(images(5))) == 5
    assert handler.asked == ["POST", *["GET"] * 6, "POST"]
    assert clock.pauses == [1, 2, 4, 5, 5, 5]
    assert resent == ([] if failure in ("refused", "connect timeout") else [5])


@pytest.mark.parametrize("health", [200, 302, 401, 404, 405, 429, 500])
@pytest.mark.anyio
async def test_any_health_but_502_503_and_504_lets_images_be_sent_again(health: int, clock: Clock) -> None:
    handler = Victim([status(503)], [status(health)])
    async with client(handler, patience_s=60) as victim:
        await victim.infer(images(1))
    assert handler.asked == ["POST", "GET", "POST"]
    assert clock.pauses == [1]


@pytest.mark.anyio
async def test_a_victim_that_is_ready_and_fails_is_given_pauses_and_ends_with_patience(clock: Clock) -> None:
    resent: list[int] = []
    handler = Victim([status(503)] * 99)
    async with client(handler, patience_s=20, on_resend=resent.append) as victim:
        with pytest.raises(Unavailable):
            await victim.infer(images(3))
    assert clock.pauses == [1, 2, 4, 5, 5, 3]
    assert handler.asked == ["POST", *["GET", "POST"] * 6]
    assert resent == [3] * 6


@pytest.mark.anyio
async def test_patience_lasts_as_long_as_any_request_succeeds(clock: Clock) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        is_first = request.method == "POST" and received(request)[0, 0, 0, 0] == 0
        return httpx.Response(503) if is_first and clock.now < 1060 else good(request)

    async with client(handler, patience_s=20) as victim:
        unlucky = asyncio.create_task(victim.infer(images(1)))
        while not unlucky.done():
            await victim.infer(images(2)[1:])
            await asyncio.sleep(1)
        assert (await unlucky).shape == (1, 2)


@pytest.mark.anyio
async def test_a_success_makes_the_pauses_short_again(clock: Clock) -> None:
    handler = Victim([status(503)] * 3)
    async with client(handler, patience_s=60) as victim:
        await victim.infer(images(1))
        handler.answers["POST"] = [status(503)]
        await victim.infer(images(1))
    assert clock.pauses == [1, 2, 4, 1]


@pytest.mark.anyio
async def test_overload_is_waited_out_without_a_poll(clock: Clock) -> None:
    handler = Victim([status(429)] * 3)
    async with client(handler, patience_s=60) as victim:
        await victim.infer(images(1))
    assert handler.asked == ["POST"] * 4
    assert clock.pauses == [1, 2, 4]


@pytest.mark.anyio
async def test_retry_after_is_honored_as_far_as_patience_lasts(clock: Clock) -> None:
    busy = httpx.Response(429, headers={"Retry-After": "7"})
    async with client(failing_first(2, lambda: busy), patience_s=30) as victim:
        await victim.infer(images(1))
    assert clock.pauses == [7, 7]
    async with client(failing_first(9, lambda: busy), patience_s=10) as victim:
        with pytest.raises(Overloaded) as caught:
            await victim.infer(images(1))
    assert caught.value.retry_after == 7
    assert clock.pauses == [7, 7, 7, 3]


@pytest.mark.anyio
async def test_connecting_and_health_have_five_seconds_at_most() -> None:
    timeouts: dict[str, dict[str, float | None]] = {}

    def handler(request: httpx.Request) -> httpx.Response:
        timeouts[request.method] = request.extensions["timeout"]
        return good(request)

    for timeout_s, quick_s in ((60.0, 5.0), (2.0, 2.0)):
        async with client(handler, timeout_s=timeout_s) as victim:
            await victim.infer(images(1))
            assert await victim.ready()
        assert timeouts["POST"] == {"connect": quick_s, "read": timeout_s, "write": timeout_s, "pool": None}
        assert {timeouts["GET"][phase] for phase in ("connect", "read", "write")} == {quick_s}


class Hosts:
    """Replicas of one victim, each a handler; notes who is sent images."""

    def __init__(self, **handlers: Callable[[httpx.Request], httpx.Response]) -> None:
        self.handlers = handlers
        self.sent: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.sent.append(request.url.host)
        return self.handlers[request.url.host](request)

    def client(self, **options: Any) -> AsyncVictimClient:
        return client(self, *(f"http://{host}" for host in self.handlers), in_flight=1, **options)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.anyio
async def test_another_replica_is_used_at_once(failure: str, clock: Clock) -> None:
    resent: list[int] = []
    hosts = Hosts(down=lambda _: FAILURES[failure][0](), up=good)
    async with hosts.client(patience_s=30, on_resend=resent.append) as victim:
        for _ in range(3):
            await victim.infer(images(2))
    assert hosts.sent == ["down", "up", "up", "up"]
    assert resent == ([] if failure in ("refused", "connect timeout") else [2])
    assert clock.pauses == []


@pytest.mark.anyio
async def test_a_replica_that_goes_on_failing_is_tried_ever_more_rarely(clock: Clock) -> None:
    hosts = Hosts(down=lambda _: httpx.Response(503), up=good)
    tried: list[float] = []
    async with hosts.client(patience_s=30) as victim:
        for _ in range(200):
            before = hosts.sent.count("down")
            await victim.infer(images(1))
            if hosts.sent.count("down") > before:
                tried.append(clock.now - 1000)
            clock.now += 0.125
    assert tried == [0, 1, 3, 7, 12, 17, 22]


MOVING = sorted(FAILURES.keys() - {"504", "read timeout"})


@pytest.mark.parametrize("failure", MOVING)
@pytest.mark.anyio
async def test_without_patience_a_failure_moves_on_once(failure: str, clock: Clock) -> None:
    resent: list[int] = []
    fails, kind = FAILURES[failure]
    free = failure in ("refused", "connect timeout")
    hosts = Hosts(down=lambda _: fails(), up=good)
    async with hosts.client(on_resend=resent.append) as victim:
        assert len(await victim.infer(images(2))) == 2
    assert hosts.sent == ["down", "up"]
    assert resent == ([] if free else [2])

    alike = failing_first(9, fails)
    hosts = Hosts(first=alike, second=alike, third=alike)
    async with hosts.client(on_resend=resent.append) as victim:
        with pytest.raises(kind) as caught:
            await victim.infer(images(4))
    assert type(caught.value) is kind
    assert hosts.sent == ["first", "second"]
    assert resent == ([] if free else [2, 4])
    assert clock.pauses == []


@pytest.mark.parametrize("failure", ["504", "read timeout"])
@pytest.mark.anyio
async def test_without_patience_a_time_out_is_not_waited_for_twice(failure: str, clock: Clock) -> None:
    hosts = Hosts(down=lambda _: FAILURES[failure][0](), up=good)
    async with hosts.client() as victim:
        with pytest.raises(UpstreamTimeout):
            await victim.infer(images(1))
        await victim.infer(images(1))
    assert hosts.sent == ["down", "up"]


@pytest.mark.anyio
async def test_without_patience_a_victim_that_goes_on_failing_is_spared_but_for_trials(clock: Clock) -> None:
    begun = clock.now

    def down_for_a_while(request: httpx.Request) -> httpx.Response:
        return good(request) if clock.now > begun + 30 else httpx.Response(502)

    hosts = Hosts(one=down_for_a_while, other=lambda _: httpx.Response(503))
    told: list[ServiceError | None] = []
    async with hosts.client() as victim:
        for _ in range(80):
            try:
                await victim.infer(images(1))
                told.append(None)
            except ServiceError as error:
                told.append(error)
            clock.now += 0.5
    spared = [error for error in told if isinstance(error, CircuitOpen)]
    assert all(error.retry_after is not None and 0 < error.retry_after <= replicas.BACKOFF_LAST_S for error in spared)
    assert len(spared) > 30, "half a minute of failures is mostly silence"
    assert hosts.sent.count("one") < 20 + told.count(None)
    assert not any(told[-10:]), "a success on trial closes it again"


@pytest.mark.anyio
async def test_overload_trips_no_breaker(clock: Clock) -> None:
    async with Hosts(busy=lambda _: httpx.Response(429)).client() as victim:
        for _ in range(20):
            with pytest.raises(Overloaded):
                await victim.infer(images(1))
            clock.now += 0.5


@pytest.mark.anyio
async def test_without_patience_no_image_moves_on_to_a_replica_that_is_away_or_rests(clock: Clock) -> None:
    hosts = Hosts(down=Victim([status(502)] * 9), away=Victim([], [status(503)]))
    async with hosts.client() as victim:
        with pytest.raises(UpstreamUnreachable, match="down"):
            await victim.infer(images(1))
        with pytest.raises(UpstreamUnreachable, match="down"):
            await victim.infer(images(1))
    assert hosts.sent == ["down", "down"]
    assert clock.pauses == []


@pytest.mark.anyio
async def test_without_patience_a_slow_poll_does_not_bring_the_first_replica_back(clock: Clock) -> None:
    def slow(_request: httpx.Request) -> httpx.Response:
        clock.now += 5
        return throws(httpx.ConnectTimeout("slow"))

    down = Victim([status(503)] * 9)
    async with Hosts(down=down, away=slow).client() as victim:
        with pytest.raises(Unavailable):
            await victim.infer(images(1))
    assert down.asked == ["POST"]


@pytest.mark.anyio
async def test_of_equal_replicas_any_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    monkeypatch.setattr(pool.random, "random", generator.random)
    hosts = Hosts(first=good, second=good, third=good)
    async with hosts.client() as victim:
        for _ in range(60):
            await victim.infer(images(1))
    assert all(hosts.sent.count(host) >= 10 for host in ("first", "second", "third"))


@pytest.mark.anyio
async def test_a_replica_that_fails_is_avoided_while_another_answers() -> None:
    hosts: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            hosts.append(request.url.host)
        return httpx.Response(503, headers={"Retry-After": "60"}) if request.url.host == "down" else good(request)

    async with client(handler, "http://down", "http://up", in_flight=1, patience_s=0.2) as victim:
        for _ in range(5):
            await victim.infer(images(1))
    assert hosts.count("down") == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidInput), (404, NotFound), (413, TooLarge), (403, UpstreamInvalid), (500, UpstreamInvalid)],
)
@pytest.mark.anyio
async def test_refusals_are_not_retried_and_carry_the_victims_words(status: int, kind: type[ServiceError]) -> None:
    asked = 0

    def handler(_request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return httpx.Response(status, json={"error": "expected shape [N, 3, 224, 224]"})

    async with client(handler, patience_s=30) as victim:
        with pytest.raises(kind, match=r"expected shape \[N, 3, 224, 224\]") as caught:
            await victim.infer(images(1))
        assert type(caught.value) is kind
    assert asked == 1


@pytest.mark.parametrize("content", [b"plain words", b'{"detail": "plain words"}', b'["plain words"]'])
@pytest.mark.anyio
async def test_refusals_in_other_forms_are_told_too(content: bytes) -> None:
    async with client(lambda _: httpx.Response(400, content=content)) as victim:
        with pytest.raises(InvalidInput, match="plain words"):
            await victim.infer(images(1))


NONSENSE: dict[str, Callable[[], httpx.Response]] = {
    "pixels of another image": lambda: scored(np.ones((2, 2, 4, 4), np.float32)),
    "a plane of logits": lambda: scored(np.full((2, 1, 2, 2), -3, np.float32)),
    "no json": lambda: httpx.Response(200, content=b"<html>"),
    "other json": lambda: httpx.Response(200, json={"label": "glioma"}),
    "bad header": lambda: httpx.Response(200, json={}, headers={oip.HEADER: "x"}),
    "redirect": lambda: httpx.Response(302, headers={"Location": "http://elsewhere"}),
    "no content": lambda: httpx.Response(204),
    "too few rows": lambda: scored(np.ones((1, 4), np.float32)),
    "too many rows": lambda: scored(np.ones((3, 4), np.float32)),
    "one dimension": lambda: scored(np.ones(2, np.float32)),
    "no columns": lambda: scored(np.ones((2, 0), np.float32)),
    "nan": lambda: scored(np.full((2, 4), np.nan, np.float32)),
    "infinite": lambda: scored(np.full((2, 4), np.inf, np.float32)),
    "infinite as float32": lambda: scored(np.full((2, 4), 1e300)),
    "no known output": lambda: httpx.Response(
        200,
        content=oip.encode_response(
            [(oip.Tensor(name, np.ones((2, 4), np.float32)), False) for name in "ab"],
            model_name="m",
            model_version="1",
        )[0],
    ),
}


@pytest.mark.parametrize("answer", NONSENSE)
@pytest.mark.anyio
async def test_nonsense_is_an_invalid_answer_and_never_asked_again(answer: str) -> None:
    asked = 0

    def handler(_request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return NONSENSE[answer]()

    async with client(handler, patience_s=30) as victim:
        with pytest.raises(UpstreamInvalid):
            await victim.infer(images(2))
    assert asked == 1


@pytest.mark.anyio
async def test_a_number_of_classes_that_changes_is_an_invalid_answer() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return scored(np.ones((1, 2 + int(received(request).max() > 0)), np.float32))

    async with client(handler, batch=1) as victim:
        with pytest.raises(UpstreamInvalid, match="number of classes"):
            await victim.infer(images(2))


@pytest.mark.anyio
async def test_scores_that_turn_from_images_to_pixels_are_an_invalid_answer() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return scored(np.ones((1, 2, 2, 2) if received(request).max() > 0 else (1, 2), np.float32))

    async with client(handler, batch=1) as victim:
        with pytest.raises(UpstreamInvalid, match="scores images or pixels"):
            await victim.infer(images(2))


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.anyio
async def test_scores_of_every_pixel_keep_their_order(planes: int) -> None:
    sent = np.random.default_rng(0).random((20, planes, 4, 6)).astype(np.float32)

    def handler(request: httpx.Request) -> httpx.Response:
        return scored(received(request))

    async with client(handler, batch=3) as victim:
        scores = await victim.infer(sent)
    assert np.array_equal(scores, np.concatenate([1 - sent, sent], axis=1) if planes == 1 else sent)


@pytest.mark.anyio
async def test_json_answers_and_single_outputs_of_any_name_are_read() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return scored(np.full((len(received(request)), 3), 0.25), name="logits", binary=False)

    async with client(handler) as victim:
        scores = await victim.infer(images(2))
    assert scores.dtype == np.float32
    assert scores.tolist() == [[0.25] * 3] * 2


@pytest.mark.anyio
async def test_one_failure_ends_the_other_requests() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        if received(request)[0, 0, 0, 0] == 0:
            return httpx.Response(500)
        await asyncio.sleep(3600)
        return good(request)

    async with client(handler, batch=1) as victim:
        with pytest.raises(UpstreamInvalid):
            await asyncio.wait_for(victim.infer(images(8)), timeout=30)


@pytest.mark.anyio
async def test_describe_sends_a_png_and_returns_the_json_answer() -> None:
    told: dict[str, object] = {"label": "b", "labels": ["a", "b"], "probabilities": [0.25], "artifact": {"id": "x"}}

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["Content-Type"] == "image/png"
        assert decode_image(request.content, channels=1, size=(2, 2)).max() == 1
        return httpx.Response(200, json=told)

    async with client(handler) as victim:
        assert await victim.describe(np.ones((1, 2, 2), np.float32)) == told
        told = {"labels": ["a", "b"], "lesion_fraction": 0.0, "mask": "aaaa"}
        assert await victim.describe(np.ones((1, 2, 2), np.float32)) == told


@pytest.mark.parametrize(
    "content", [b"<html>", b"[]", b'{"label": "a"}', b'{"mask": "aaaa"}', b'{"labels": ["a", "b"]}']
)
@pytest.mark.anyio
async def test_describe_refuses_nonsense(content: bytes) -> None:
    async with client(lambda _: httpx.Response(200, content=content)) as victim:
        with pytest.raises(UpstreamInvalid):
            await victim.describe(np.ones((1, 2, 2), np.float32))


@pytest.mark.anyio
async def test_ready_when_any_replica_is() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.host == "gone":
            raise httpx.ConnectError("refused")
        return httpx.Response(200 if request.url.host == "up" else 503)

    for urls, expected in ((["gone", "down", "up"], True), (["gone", "down"], False)):
        async with client(handler, *(f"http://{host}" for host in urls)) as victim:
            assert await victim.ready() is expected


def test_the_synchronous_client_takes_the_same_arguments() -> None:
    assert inspect.signature(HTTPVictim) == inspect.signature(AsyncVictimClient)


def test_the_synchronous_client_maps_tensors_to_tensors() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200)
        if request.headers["Content-Type"] == "image/png":
            return httpx.Response(200, json={"label": "a", "labels": ["a"], "probabilities": [1.0]})
        return good(request)

    with HTTPVictim([URL], batch=3, transport=httpx.MockTransport(handler)) as victim:
        batch = torch.from_numpy(images(7).copy()).double().requires_grad_()
        scores = victim(batch)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        assert scores[:, 0].tolist() == list(range(7))
        assert victim.describe(batch[0])["label"] == "a"
        assert victim.ready()


def test_the_synchronous_client_maps_images_to_scores_of_their_pixels() -> None:
    batch = torch.rand(5, 2, 4, 6)
    with HTTPVictim([URL], batch=2, transport=httpx.MockTransport(lambda one: scored(received(one)))) as victim:
        assert torch.equal(victim(batch), batch)


def test_what_on_resend_raises_reaches_the_caller_and_stops_the_sending() -> None:
    class SpentError(Exception):
        pass

    asked = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += request.method == "POST"
        return httpx.Response(503 if request.method == "POST" else 200)

    def refuse(_images: int) -> None:
        raise SpentError

    with HTTPVictim(
        [URL], patience_s=30, on_resend=refuse, in_flight=1, transport=httpx.MockTransport(handler)
    ) as victim:
        for _ in range(2):
            with pytest.raises(SpentError):
                victim(torch.zeros(1, 1, 2, 2))
    assert asked == 2


def test_closing_leaves_nothing_behind_and_is_final() -> None:
    victim = HTTPVictim([URL], transport=httpx.MockTransport(good))
    victim(torch.zeros(1, 1, 2, 2))
    victim.close()
    victim.close()
    with pytest.raises(RuntimeError, match="closed"):
        victim(torch.zeros(1, 1, 2, 2))
    gc.collect()  # a loop or socket left open would warn here


def test_messages_name_the_url_that_failed() -> None:
    content = json.dumps({"error": "no"}).encode()
    with (
        HTTPVictim([URL], transport=httpx.MockTransport(lambda _: httpx.Response(400, content=content))) as victim,
        pytest.raises(InvalidInput, match="http://victim:8000/predict answered 400: no"),
    ):
        victim(torch.zeros(1, 1, 2, 2))
