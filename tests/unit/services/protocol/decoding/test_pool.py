import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import numpy as np
import psutil
import pytest

from services.protocol import deadlines
from services.protocol.decoding.pool import DecodingPool, Limits
from services.protocol.errors import (
    DeadlineExceeded,
    InvalidInput,
    ServiceError,
    TooLarge,
    Unavailable,
    UnsupportedMedia,
)

pytestmark = pytest.mark.anyio

STANDIN = "decoding_standins:decode"
LIMITS = Limits(memory_bytes=2**29, cpu_s=1, wall_s=60)


@asynccontextmanager
async def pool(workers: int = 1, limits: Limits = LIMITS, decoder: str = STANDIN) -> AsyncIterator[DecodingPool]:
    async with DecodingPool(workers, limits=limits, decoder=decoder) as made:
        yield made
    assert not children()


def children() -> set[int]:
    return {one.pid for one in psutil.Process().children() if "services.protocol.decoding.worker" in one.cmdline()}


async def decode(made: DecodingPool, data: bytes = b"fine") -> np.ndarray:
    image, own = await made.decode(data, channels=3, size=(4, 5))
    assert own == (7, len(data))
    assert image.shape == (3, 4, 5)
    return image


async def process_of(made: DecodingPool) -> int:
    return (await made.decode(b"who", channels=1, size=(1, 1)))[1][0]


async def test_images_come_back_and_the_process_stays() -> None:
    async with pool() as made:
        assert np.array_equal(await decode(made), np.full((3, 4, 5), 0.25, np.float32))
        first = await process_of(made)
        large = bytes(5 * 2**20)
        assert (await made.decode(large, channels=3, size=(900, 800)))[0].shape == (3, 900, 800)
        assert await process_of(made) == first


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"memory", TooLarge, "memory"),
        (b"memory without end", TooLarge, "memory"),
        (b"killed for memory", TooLarge, "memory"),
        (b"time", TooLarge, "longer"),
        (b"crash", InvalidInput, "crashes"),
        (b"exit", InvalidInput, "crashes"),
        (b"nonsense", InvalidInput, "crashes"),
        (b"no size", InvalidInput, "crashes"),
    ],
)
async def test_what_exceeds_a_limit_or_crashes_ends_its_process_alone(
    data: bytes, kind: type[ServiceError], words: str
) -> None:
    async with pool() as made:
        first = await process_of(made)
        bad, good = await asyncio.gather(decode(made, data), decode(made, b"good"), return_exceptions=True)
        assert type(bad) is kind
        assert words in str(bad)
        assert isinstance(good, np.ndarray)
        assert await process_of(made) != first
    assert not children()


async def test_a_process_that_ended_between_two_files_is_replaced() -> None:
    async with pool() as made:
        first = await process_of(made)
        psutil.Process(first).kill()
        while psutil.pid_exists(first) and psutil.Process(first).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)
        assert await process_of(made) != first


async def test_a_file_that_is_read_while_the_pool_closes_is_told_so() -> None:
    async with pool() as made:
        await process_of(made)
        reading = asyncio.create_task(decode(made, b"hang"))
        await asyncio.sleep(0.1)
    with pytest.raises(Unavailable, match="shutting down"):
        await reading


async def test_a_pool_that_closes_while_a_process_starts_decodes_nothing_more() -> None:
    async with pool() as made:
        reading = asyncio.create_task(decode(made, b"hang"))
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await reading


async def test_a_size_beyond_the_pixels_that_are_allowed_is_not_believed() -> None:
    async with pool() as made:
        with pytest.raises(InvalidInput, match="crashes"):
            await made.decode(b"fine", channels=1, size=(1, 1), max_pixels=27)  # it says 7 x 4


def test_a_hard_limit_below_the_own_one_is_kept_to() -> None:
    told = (
        "import resource; from services.protocol.decoding.worker import limit_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); limit_memory(2**40)\n"
        "print(resource.getrlimit(resource.RLIMIT_AS) == (2**31, 2**31))"
    )
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True).stdout == "True\n"


async def test_a_decoder_that_hangs_is_ended_by_the_clock() -> None:
    async with pool(limits=Limits(wall_s=0.3)) as made:
        await process_of(made)
        with pytest.raises(TooLarge, match="longer"):
            await decode(made, b"hang")
        with suppress(TooLarge):  # a busy machine may take longer than that
            await decode(made)


async def test_a_request_whose_deadline_passes_gives_its_worker_back() -> None:
    async with pool() as made:
        first = await process_of(made)

        async def ask() -> None:
            deadlines.narrow(0.2)
            async with deadlines.in_time():
                await decode(made, b"hang")

        with pytest.raises(DeadlineExceeded):
            await asyncio.create_task(ask())
        assert await process_of(made) != first


async def test_whoever_gives_up_while_a_process_starts_leaves_it_to_the_next() -> None:
    async with pool() as made:
        first = asyncio.create_task(decode(made))
        while not children():
            await asyncio.sleep(0.001)
        started = children()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert {await process_of(made)} == started


async def test_refusals_keep_their_kind_and_words_and_the_process() -> None:
    async with pool() as made:
        first = await process_of(made)
        with pytest.raises(UnsupportedMedia, match=r"^nothing for ä x{900}"):
            await decode(made, b"refusal")
        assert await process_of(made) == first


async def test_a_fault_of_the_program_is_told_without_its_words() -> None:
    async with pool() as made:
        with pytest.raises(RuntimeError, match="KeyError") as caught:
            await decode(made, b"fault")
        assert "patient" not in str(caught.value)
        await decode(made)


async def test_a_process_that_sends_garbage_is_replaced() -> None:
    async with pool() as made:
        for _ in range(3):
            with suppress(ServiceError, RuntimeError):
                await made.decode(b"garbage", channels=1, size=(1, 1))
        # What garbage remains was read as images and messages, or ended the process.
        for _ in range(20):
            with suppress(ServiceError, RuntimeError, AssertionError):
                await decode(made)
                break
        else:
            pytest.fail("the worker was not replaced")


async def test_a_process_imports_what_decoding_needs_and_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    async with pool() as made:
        assert (await decode(made, b"environment")).max() == 0
        assert (await decode(made, b"modules")).max() == 0
    async with pool(decoder="services.protocol.images:decode_sized") as made:
        with pytest.raises(UnsupportedMedia):
            await made.decode(b"no image", channels=1, size=(2, 2))


async def test_processes_start_when_they_are_needed() -> None:
    async with pool(2) as made:
        assert not children()
        await decode(made)
        await decode(made)
        assert len(children()) == 1
        await asyncio.gather(*(decode(made) for _ in range(8)))
        assert len(children()) <= 2


async def test_a_closed_pool_ends_what_is_running_and_takes_nothing_more() -> None:
    async with pool() as made:
        await process_of(made)
        running = [asyncio.create_task(decode(made, b"hang")) for _ in range(2)]
        await asyncio.sleep(0.05)
    for result in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(result, ServiceError)
    with pytest.raises(Unavailable):
        await decode(made)


ORPHANING = """
import asyncio, os
from services.protocol.decoding.pool import DecodingPool

async def main():
    async with DecodingPool(1, decoder="decoding_standins:decode") as pool:
        print((await pool.decode(b"who", channels=1, size=(1, 1)))[1][0], flush=True)
        os._exit(0)

asyncio.run(main())
"""


def test_processes_end_with_the_service_however_it_ends() -> None:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", ORPHANING], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(60)


async def test_a_worker_that_cannot_start_is_no_fault_of_the_file(capfd: pytest.CaptureFixture[str]) -> None:
    async with pool(decoder="no_such_module:decode") as made:
        for _ in range(2):
            with pytest.raises(ServiceError, match="before it was ready") as caught:
                await decode(made)
            assert caught.value.status == 500
    assert "no_such_module" in capfd.readouterr().err
    gc.collect()
