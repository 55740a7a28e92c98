import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from services.batching import Batcher
from services.protocol.errors import Unavailable
from services.upstream import Array, Share, Upstream

pytestmark = pytest.mark.anyio


class Recorder:
    """Doubles its input, notes the batch sizes, and can be held back."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.started = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images: Array) -> Array:
        self.batches.append(len(images))
        self.threads.add(threading.current_thread().name)
        self.started.set()
        assert self.gate.wait(30)
        if (images < 0).any():
            raise ValueError("negative")
        doubled: Array = images * 2
        return doubled

    async def hold(self) -> None:
        """Waits until a batch has reached the device."""
        assert await asyncio.to_thread(self.started.wait, 30)


def images(count: int, start: float = 1) -> Array:
    return np.arange(start, start + count, dtype=np.float32)[:, None]


async def test_one_request_is_answered_in_order() -> None:
    recorder = Recorder()
    async with Batcher(recorder, max_batch=8, max_delay_s=0) as batcher:
        assert np.array_equal(await batcher(images(3)), images(3) * 2)
    assert recorder.batches == [3]


async def test_a_large_request_is_split() -> None:
    recorder = Recorder()
    async with Batcher(recorder, max_batch=4, max_delay_s=0) as batcher:
        assert np.array_equal(await batcher(images(10)), images(10) * 2)
    assert recorder.batches == [4, 4, 2]


async def test_concurrent_requests_are_merged_and_their_tails_share_a_batch() -> None:
    recorder = Recorder()
    async with Batcher(recorder, max_batch=4, max_delay_s=0.05) as batcher:
        answers = await asyncio.gather(*(batcher(images(3, 10 * i + 1)) for i in range(4)))
    for i, answer in enumerate(answers):
        assert np.array_equal(answer, images(3, 10 * i + 1) * 2)
    assert recorder.batches == [4, 4, 4]
    assert len(recorder.threads) == 1


async def test_a_request_fails_for_its_own_images_and_its_neighbours_are_answered_at_once() -> None:
    recorder = Recorder()
    async with Batcher(recorder, max_batch=4, max_delay_s=0.05) as batcher:
        answers = await asyncio.gather(
            batcher(images(2)), batcher(-images(10)), batcher(images(2)), return_exceptions=True
        )
        assert isinstance(answers[1], ValueError)
        for answer in (answers[0], answers[2]):
            assert isinstance(answer, np.ndarray)
            assert np.array_equal(answer, images(2) * 2)
    assert recorder.batches == [4, 2, 2, 2], "halved; the rest of a failed request is not run"


async def test_one_faulty_image_among_many_is_found_by_halving() -> None:
    recorder = Recorder()
    async with Batcher(recorder, max_batch=64, max_delay_s=0.05) as batcher:
        asked = [batcher(-images(1) if number == 37 else images(1, number)) for number in range(64)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
    for number, answer in enumerate(answers):
        if number == 37:
            assert isinstance(answer, ValueError)
        else:
            assert isinstance(answer, np.ndarray)
            assert answer.item() == 2 * number
    assert recorder.batches[0] == 64
    assert sorted(recorder.batches[1:]) == sorted([32, 32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1])


async def test_a_wrong_number_of_rows_is_a_failure() -> None:
    async with Batcher(lambda batch: batch[1:], max_batch=4, max_delay_s=0) as batcher:
        with pytest.raises(RuntimeError, match="2 images were answered with 1 rows"):
            await batcher(images(2))


async def test_batches_with_rows_of_different_shapes_fail_their_request_and_no_other() -> None:
    async with Batcher(
        lambda batch: np.ones((len(batch), len(batch)), np.float32), max_batch=4, max_delay_s=0
    ) as batcher:
        with pytest.raises(ValueError, match="dimension"):
            await asyncio.wait_for(batcher(images(6)), timeout=30)
        assert (await asyncio.wait_for(batcher(images(3)), timeout=30)).shape == (3, 3)


@pytest.mark.parametrize("kind", [StopIteration, asyncio.CancelledError, SystemExit])
async def test_no_failure_ends_the_work(kind: type[BaseException]) -> None:
    failures = iter([kind()])

    def run(batch: Array) -> Array:
        for failure in failures:
            raise failure
        return batch

    async with Batcher(run, max_batch=4, max_delay_s=0) as batcher:
        with pytest.raises(RuntimeError, match=kind.__name__):
            await asyncio.wait_for(batcher(images(1)), timeout=30)
        assert (await asyncio.wait_for(batcher(images(2)), timeout=30)).shape == (2, 1)


async def test_a_canceled_request_leaves_the_queue_and_blocks_nobody() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    async with Batcher(recorder, max_batch=4, max_delay_s=0) as batcher:
        running = asyncio.create_task(batcher(images(6)))
        await recorder.hold()
        waiting = asyncio.create_task(batcher(images(50)))
        last = asyncio.create_task(batcher(images(1)))
        await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        recorder.gate.set()
        assert np.array_equal(await last, images(1) * 2)
    assert recorder.batches == [4, 1]


async def test_leaving_refuses_what_waits_and_what_comes_later() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    async with Batcher(recorder, max_batch=2, max_delay_s=0) as batcher:
        tasks = [asyncio.create_task(batcher(images(2))) for _ in range(2)]
        await recorder.hold()
        threading.Timer(0.05, recorder.gate.set).start()
    for task in tasks:
        with pytest.raises(Unavailable):
            await task
    with pytest.raises(Unavailable):
        await batcher(images(1))
    assert recorder.batches == [2]


async def test_many_requests_of_any_size_all_get_their_own_answers() -> None:
    rng = np.random.default_rng(0)
    async with Batcher(Recorder(), max_batch=16, max_delay_s=0.001) as batcher:

        async def one(start: int, count: int, pause: float) -> bool:
            await asyncio.sleep(pause)
            return np.array_equal(await batcher(images(count, start)), images(count, start) * 2)

        asked = [one(1000 * i, int(rng.integers(1, 60)), float(rng.uniform(0, 0.05))) for i in range(100)]
        assert all(await asyncio.gather(*asked))


def test_batches_need_a_size_and_no_negative_delay() -> None:
    for size, delay in ((0, 0.0), (1, -1.0)):
        with pytest.raises(ValueError, match="max_batch"):
            Batcher(Recorder(), max_batch=size, max_delay_s=delay)


async def test_requests_that_are_asked_about_apart_are_computed_together() -> None:
    asked: list[int] = []

    async def ask(images: Array, _shares: Sequence[Share], _again: bool) -> Array:
        asked.append(len(images))
        return images

    recorder = Recorder()
    upstream = Upstream(ask, lambda: 32, together=False)
    async with Batcher(recorder, max_batch=8, max_delay_s=0.05, upstream=upstream) as batcher:
        await asyncio.gather(*(batcher(images(1, i + 1)) for i in range(8)))
    assert recorder.batches == [8]
    assert asked == [1] * 8
