"""Batches that are asked about: how many are under way, who is answered with what, and who pays for whose mistake."""

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from services.batching import Batcher
from services.protocol import deadlines, logs
from services.protocol.errors import CircuitOpen, InvalidInput, UpstreamUnreachable
from services.upstream import Array, Share, Upstream

pytestmark = pytest.mark.anyio


class Payer:
    """Counts what is sent on its account."""

    def __init__(self) -> None:
        self.spent = 0

    def spend(self, queries: int) -> None:
        self.spent += queries

    def refund(self, queries: int) -> None:
        self.spent -= queries


class Victim:
    """Answers images with themselves, when it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.resent: list[int] = []
        self.left: list[float] = []
        self.identities: list[str | None] = []
        self.go = asyncio.Event()
        self.under_way = self.most = self.cancelled = 0
        self.refuses = -1.0  # a batch with an image of this value
        self.error: Exception = InvalidInput("no such image")

    async def __call__(self, images: Array, shares: Sequence[Share], again: bool) -> Array:
        assert sum(share.images for share in shares) == len(images)
        for share in shares:
            if not again:
                share.payer.spend(share.images)
        if again:
            self.resent.append(len(images))
        self.batches.append(images[:, 0].tolist())
        self.left.append(deadlines.left_s())
        self.identities.append(logs.request_id())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
        if (images == self.refuses).any():
            raise self.error
        return images

    def release(self) -> None:
        """Answers what is under way, and nothing that comes later."""
        self.go.set()
        self.go = asyncio.Event()

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]


def batcher_of(victim: Victim, width: int, *, max_batch: int = 64, together: bool = True) -> Batcher:
    upstream = Upstream(victim, lambda: width, together)
    return Batcher(None, max_batch=max_batch, max_delay_s=0, upstream=upstream)


def images(*values: float) -> Array:
    return np.array(values, np.float32)[:, None]


async def begun(*work: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """The work as tasks, each of which has come as far as it can."""
    tasks = []
    for one in work:
        tasks.append(asyncio.create_task(one))
        await settled()
    return tasks


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_comes_meanwhile_goes_together_and_in_fair_shares() -> None:
    victim = Victim()
    async with batcher_of(victim, width=2) as batcher:
        tasks = await begun(*(batcher(images(value, value + 0.5)) for value in range(6)))
        assert victim.batches == [[0, 0.5], [1, 1.5]]
        victim.go.set()
        answers = await asyncio.gather(*tasks)
    assert victim.sizes == [2, 2, 4, 4]
    for value, answer in enumerate(answers):
        assert answer.tolist() == [[value], [value + 0.5]]


@pytest.mark.parametrize("width", [1, 4, 8])
async def test_as_many_batches_are_under_way_as_the_upstream_holds(width: int) -> None:
    victim = Victim()
    async with batcher_of(victim, width) as batcher:
        tasks = [asyncio.create_task(batcher(images(value))) for value in range(64)]
        await settled()
        assert victim.under_way == width
        assert max(victim.sizes) == 64 // width
        victim.go.set()
        assert [answer.item() for answer in await asyncio.gather(*tasks)] == list(range(64))
    assert victim.most == width


async def test_the_width_may_change() -> None:
    victim = Victim()
    widths = iter([1, *[3] * 1000])
    async with Batcher(None, max_batch=1, max_delay_s=0, upstream=Upstream(victim, lambda: next(widths))) as batcher:
        tasks = await begun(*(batcher(images(value)) for value in range(4)))
        assert victim.under_way == 3
        victim.go.set()
        await asyncio.gather(*tasks)


async def test_the_next_batch_is_computed_while_the_one_before_it_is_under_way() -> None:
    victim, computed = Victim(), []

    def compute(batch: Array) -> Array:
        computed.append(len(batch))
        return batch + 1

    async with Batcher(compute, max_batch=4, max_delay_s=0, upstream=Upstream(victim, lambda: 3)) as batcher:
        task = asyncio.create_task(batcher(images(*range(12))))
        while victim.under_way < 3:
            await asyncio.sleep(0.001)
        assert computed == [4, 4, 4]
        assert (await batcher.compute(images(7, 8))).tolist() == [[8], [9]], "which no upstream holds up"
        victim.go.set()
        assert (await task)[:, 0].tolist() == list(range(1, 13))


async def test_batches_that_are_answered_in_another_order_are_put_together_in_theirs() -> None:
    gates = [asyncio.Event() for _ in range(3)]

    async def ask(batch: Array, _shares: Sequence[Share], _again: bool) -> Array:
        await gates[int(batch[0, 0]) // 2].wait()
        return batch

    async with Batcher(None, max_batch=2, max_delay_s=0, upstream=Upstream(ask, lambda: 3)) as batcher:
        (task,) = await begun(batcher(images(*range(6))))
        for gate in reversed(gates):
            gate.set()
            await settled()
        assert (await task)[:, 0].tolist() == list(range(6))


async def test_where_images_do_not_travel_together_each_request_goes_by_itself() -> None:
    victim = Victim()
    victim.refuses = 2
    async with batcher_of(victim, width=16, together=False) as batcher:
        tasks = await begun(*(batcher(images(value)) for value in range(4)))
        victim.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert victim.batches == [[0], [1], [2], [3]]
    assert isinstance(answers[2], InvalidInput)
    assert victim.resent == []


async def test_nobody_fails_for_what_another_one_sent_and_all_are_asked_again_at_once() -> None:
    victim = Victim()
    victim.refuses = 2
    payers = [Payer() for _ in range(4)]
    async with batcher_of(victim, width=1) as batcher:
        tasks = await begun(*(batcher(images(value), payer) for value, payer in enumerate(payers)))
        for sent in ([1, 2, 3], [3]):  # what is sent last once all that is under way was answered
            victim.release()
            await settled()
            assert victim.batches[-1] == sent
        assert victim.under_way == 3, "not one after the other"
        victim.release()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert victim.batches[2:] == [[1], [2], [3]]
    assert isinstance(answers.pop(2), InvalidInput)
    assert [answer.item() for answer in answers if isinstance(answer, np.ndarray)] == [0, 1, 3]
    assert victim.resent == [1, 1, 1]
    assert [payer.spent for payer in payers] == [1, 1, 1, 1]


@pytest.mark.parametrize("error", [UpstreamUnreachable("gone"), CircuitOpen("resting")])
async def test_a_victim_that_is_away_is_away_for_all_and_not_asked_again(error: Exception) -> None:
    victim = Victim()
    victim.refuses, victim.error = 2, error
    async with batcher_of(victim, width=1) as batcher:
        tasks = await begun(*(batcher(images(value)) for value in range(3)))
        victim.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers[1:]] == [type(error)] * 2
    assert victim.sizes == [1, 2]


async def test_who_hangs_up_frees_what_nobody_else_waits_for() -> None:
    victim = Victim()
    payer = Payer()
    async with batcher_of(victim, width=1) as batcher:
        first, second, third, fourth = await begun(*(batcher(images(value), payer) for value in range(4)))
        second.cancel()  # it waits
        first.cancel()  # its batch is under way, for it alone
        await settled()
        assert victim.cancelled == 1
        assert victim.batches == [[0], [2, 3]]
        assert payer.spent == 3, "what was not taken yet is not sent"
        third.cancel()  # its batch is under way, for another one too
        await settled()
        assert victim.cancelled == 1
        victim.go.set()
        assert (await fourth).item() == 3
        assert (await batcher(images(7))).item() == 7


async def test_images_whose_sender_hung_up_while_they_were_computed_are_not_sent() -> None:
    victim = Victim()
    victim.go.set()
    payer = Payer()
    computing, go_on = threading.Event(), threading.Event()

    def compute(batch: Array) -> Array:
        computing.set()
        assert go_on.wait(30)
        return batch

    async with Batcher(compute, max_batch=4, max_delay_s=0, upstream=Upstream(victim, lambda: 1)) as batcher:
        (gone,) = await begun(batcher(images(1), payer))
        assert await asyncio.to_thread(computing.wait, 30)
        gone.cancel()
        await settled()
        go_on.set()
        assert (await batcher(images(2))).item() == 2
    assert victim.batches == [[2]]
    assert payer.spent == 0


async def test_others_go_between_the_batches_of_a_large_request() -> None:
    victim = Victim()
    async with batcher_of(victim, width=1, max_batch=2) as batcher:
        tasks = await begun(batcher(images(0, 1, 2, 3, 4, 5)), batcher(images(7)))
        for _ in range(4):
            victim.release()
            await settled()
        assert victim.batches == [[0, 1], [2, 3], [7, 4], [5]]
        assert (await tasks[0])[:, 0].tolist() == list(range(6))


async def test_a_batch_for_several_has_the_last_of_their_deadlines_and_the_first_ones_identity() -> None:
    victim = Victim()
    async with batcher_of(victim, width=1) as batcher:

        async def ask(value: float, seconds: float) -> Array:
            deadlines.narrow(seconds)
            logs._request_id.set(f"request-{value}")
            return await batcher(images(value))

        tasks = await begun(ask(0, 5), ask(1, 50), ask(2, 500))
        victim.go.set()
        await asyncio.gather(*tasks)
    assert 0 < victim.left[0] <= 5
    assert 50 < victim.left[1] <= 500
    assert victim.identities == ["request-0", "request-1"]


async def test_an_upstream_that_gives_up_by_itself_leaves_nobody_waiting() -> None:
    async def ask(_batch: Array, _shares: Sequence[Share], _again: bool) -> Array:
        raise asyncio.CancelledError

    async with Batcher(None, max_batch=4, max_delay_s=0, upstream=Upstream(ask, lambda: 1)) as batcher:
        with pytest.raises(Exception, match="given up"):
            await batcher(images(1))
