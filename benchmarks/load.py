"""The gateway beyond its capacity: what it still answers, how late, and whether its memory stays as it is.

    python -m benchmarks.load --victim artifacts/phantom/victim --artifact artifacts/phantom/zo-ds --seconds 60

A few clients, each of which asks again as soon as it has its answer, find the capacity. Then requests of --batch images
come at fixed times (an open loop), at --times the capacity. Goodput is images answered with 200 in a second, as long as
requests come; latencies are of those answers, as ratios to the median at capacity. Memory is the gateway's, after a
tenth of the time and at its end. "generator" is its share of the cores, which it takes from the services.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import numpy as np
import psutil

from benchmarks import cli
from benchmarks.running import add_model_arguments, defended
from defense.artifact import load_artifact
from services.protocol import oip
from training.measure.results import align

_CAPACITY_S: Final = 60.0


@dataclass
class Seen:
    """What became of requests.

    Attributes:
        statuses: how often each was answered.
        latencies: seconds of those answered 200.
        in_time: how many of them while requests came.
        memory: resident set of the gateway in MB, once a second.
        until: when requests end to come, on the clock of `time.perf_counter`.
        share: of the machine's processor time, what the generator took.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    in_time: int = 0
    memory: list[float] = field(default_factory=list)
    until: float = float("inf")
    share: float = 0.0


class Generator:
    """Sends one request to a URL again and again, and watches the memory of a process."""

    def __init__(self, url: str, body: bytes, headers: dict[str, str], process: psutil.Process) -> None:
        self._url, self._body, self._headers, self._process = url, body, headers, process
        # Not httpx: with hundreds of requests in flight it took a quarter of the cores that it was to load. Connections
        # are given up before the service closes idle ones: who is just sending then gets an error.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120))

    async def closed(self, clients: int, seconds: float) -> Seen:
        """So many clients, each asking as soon as it has its answer."""
        begun = time.perf_counter()
        seen = Seen(until=begun + seconds)

        async def one() -> None:
            while time.perf_counter() < seen.until:
                await self._ask(seen)

        await self._watched(seen, asyncio.gather(*(one() for _ in range(clients))))
        return seen

    async def open(self, rate: float, seconds: float) -> Seen:
        """So many requests a second, whatever becomes of them."""
        begun, asked = time.perf_counter(), set[asyncio.Task[None]]()
        seen = Seen(until=begun + seconds)

        async def all_of_them() -> None:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(begun + number / rate - time.perf_counter(), 0))
                asked.add(asyncio.create_task(self._ask(seen)))
            await asyncio.gather(*asked)

        await self._watched(seen, all_of_them())
        return seen

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.close()

    async def _ask(self, seen: Seen) -> None:
        begun = time.perf_counter()
        async with self._http.post(f"{self._url}/predict", data=self._body, headers=self._headers) as response:
            await response.read()
        seen.statuses[response.status] += 1
        if response.status == 200:
            seen.latencies.append(time.perf_counter() - begun)
            seen.in_time += time.perf_counter() <= seen.until

    async def _watched(self, seen: Seen, work: Awaitable[object]) -> None:
        async def watch() -> None:
            while True:
                seen.memory.append(self._process.memory_info().rss / 2**20)
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        begun, took = time.perf_counter(), time.process_time()
        await work
        watching.cancel()
        seen.share = (time.process_time() - took) / (time.perf_counter() - begun) / (psutil.cpu_count() or 1)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--seconds",
        type=cli.positive_float,
        default=60.0,
        help="of overload; a minute at most is for the capacity (default 60)",
    )
    add("--times", type=cli.positive_float, default=2.0, help="the load, in capacities (default 2)")
    add("--batch", type=cli.positive_int, default=32, help="images a request (default 32)")
    add("--clients", type=cli.positive_int, default=8, help="that find out the capacity (default 8)")
    add("--max-queue", type=cli.positive_int, default=512, help="the gateway's, in images (default 512)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    shape = load_artifact(arguments.artifact).manifest.input.dimensions
    images = np.random.default_rng(0).random((arguments.batch, *shape), dtype=np.float32)
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, images)])
    flags = ["--max-queue", str(arguments.max_queue)]
    with defended(arguments, flags) as urls:
        (process,) = (one for one in psutil.Process().children() if "services.gateway" in one.cmdline())

        measuring = min(arguments.seconds, _CAPACITY_S)

        async def both() -> tuple[Seen, Seen]:
            generator = Generator(urls.gateway, body, headers, process)
            await generator.closed(arguments.clients, min(arguments.seconds, 5.0))  # warms up
            capacity = await generator.closed(arguments.clients, measuring)
            rate = arguments.times * capacity.in_time / measuring
            overload = await generator.open(rate, arguments.seconds)
            await generator.aclose()
            return capacity, overload

        capacity, overload = asyncio.run(both())
    goodput = [
        arguments.batch * seen.in_time / time_s
        for seen, time_s in ((capacity, measuring), (overload, arguments.seconds))
    ]
    median = float(np.median(capacity.latencies))
    lines = [["", "images/s", "goodput / capacity", "median", "p99", "MB early", "MB at last", "generator", "statuses"]]
    for name, seen, good in (("capacity", capacity, goodput[0]), ("overload", overload, goodput[1])):
        told = " ".join(f"{status}: {count}" for status, count in sorted(seen.statuses.items()))
        late = [f"{float(np.quantile(seen.latencies, q)) / median:.2f}" for q in (0.5, 0.99)]
        memory = [f"{seen.memory[len(seen.memory) // 10]:.0f}", f"{seen.memory[-1]:.0f}", f"{seen.share:.0%}"]
        lines.append([name, f"{good:.0f}", f"{good / goodput[0]:.2f}", *late, *memory, told])
    print(f"{arguments.times:g} times the capacity, {arguments.seconds:g} s, {arguments.batch} images a request:")
    print(align(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
