"""Images of several callers in one request: who waits, who is answered with what, and who pays for whose mistake."""

import asyncio

import numpy as np
import pytest

from services.gateway.merging import Merger
from services.protocol import deadlines, logs
from services.protocol.errors import InvalidInput, UpstreamUnreachable

pytestmark = pytest.mark.anyio


class Victim:
    """Answers each image with its mean, when it is told to."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []
        self.left: list[float] = []
        self.go = asyncio.Event()
        self.cancelled = 0
        self.refuses = -1.0  # a batch with an image of this value
        self.error: Exception = InvalidInput("no such image")

    async def __call__(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(images)
        self.left.append(deadlines.left_s())
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if (images == self.refuses).any():
            raise self.error
        return images.mean(axis=(2, 3))


def merger_of(victim, max_images: int, lanes: int, on_resend=None) -> Merger:
    return Merger(victim, max_images=max_images, lanes=lanes, on_resend=on_resend or (lambda images: None))


def images(*values: float) -> np.ndarray:
    return np.stack([np.full((1, 2, 2), value, np.float32) for value in values])


async def begun(*work) -> list[asyncio.Task]:
    tasks = [asyncio.create_task(one) for one in work]
    for _ in range(10):
        await asyncio.sleep(0)
    return tasks


async def test_the_first_go_alone_and_what_comes_meanwhile_goes_together() -> None:
    victim = Victim()
    merger = merger_of(victim, max_images=8, lanes=2)
    tasks = await begun(*(merger(images(value, value + 0.5)) for value in range(6)))
    assert [len(batch) for batch in victim.batches] == [2, 2]
    victim.go.set()
    answers = await asyncio.gather(*tasks)
    assert [len(batch) for batch in victim.batches] == [2, 2, 8]
    for value, answer in enumerate(answers):
        assert answer.tolist() == [[value], [value + 0.5]]


async def test_no_more_images_go_together_than_allowed_and_none_is_split() -> None:
    victim = Victim()
    merger = merger_of(victim, max_images=4, lanes=1)
    tasks = await begun(*(merger(images(*[0.5] * count)) for count in (1, 3, 2, 9, 1)))
    victim.go.set()
    answers = await asyncio.gather(*tasks)
    assert [len(batch) for batch in victim.batches] == [1, 3, 2, 9, 1]
    assert [len(answer) for answer in answers] == [1, 3, 2, 9, 1]


async def test_nobody_fails_for_what_another_one_sent() -> None:
    victim = Victim()
    victim.refuses = 2.0
    resent: list[int] = []
    merger = merger_of(victim, max_images=8, lanes=1, on_resend=resent.append)
    tasks = await begun(*(merger(images(value)) for value in (0.0, 1.0, 2.0, 3.0)))
    victim.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [len(batch) for batch in victim.batches] == [1, 3, 1, 1, 1]
    assert isinstance(answers.pop(2), InvalidInput)
    assert [float(answer[0, 0]) for answer in answers] == [0.0, 1.0, 3.0]
    assert resent == [1, 1, 1]


async def test_a_victim_that_is_away_is_away_for_all_and_not_asked_again() -> None:
    victim = Victim()
    victim.refuses, victim.error = 2.0, UpstreamUnreachable("gone")
    merger = merger_of(victim, max_images=8, lanes=1)
    tasks = await begun(*(merger(images(value)) for value in (0.0, 1.0, 2.0)))
    victim.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers[1:]] == [UpstreamUnreachable] * 2
    assert len(victim.batches) == 2


async def test_who_hangs_up_frees_what_nobody_else_waits_for() -> None:
    victim = Victim()
    merger = merger_of(victim, max_images=8, lanes=1)
    first, second, third, fourth = await begun(*(merger(images(value)) for value in range(4)))
    second.cancel()  # it waits
    first.cancel()  # its request is under way, for it alone
    await begun()
    assert victim.cancelled == 1
    assert [len(batch) for batch in victim.batches] == [1, 2]
    third.cancel()  # its request is under way, for another one too
    await begun()
    assert victim.cancelled == 1
    victim.go.set()
    assert (await fourth).tolist() == [[3.0]]
    assert (await merger(images(7))).tolist() == [[7.0]]


async def test_a_request_for_many_has_the_last_of_their_deadlines() -> None:
    victim = Victim()
    merger = merger_of(victim, max_images=8, lanes=1)

    async def ask(value: float, seconds: float) -> np.ndarray:
        deadlines.narrow(seconds)
        return await merger(images(value))

    tasks = await begun(ask(0, 5), ask(1, 50), ask(2, 500))
    victim.go.set()
    await asyncio.gather(*tasks)
    assert 0 < victim.left[0] <= 5
    assert 50 < victim.left[1] <= 500


async def test_the_request_id_of_the_first_caller_travels() -> None:
    seen: list[str | None] = []

    async def victim(sent: np.ndarray) -> np.ndarray:
        seen.append(logs.request_id())
        return sent.mean(axis=(2, 3))

    await merger_of(victim, max_images=8, lanes=1)(images(1))
    assert seen == [logs.request_id()]
