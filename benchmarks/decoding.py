"""What it costs to decode foreign files in worker processes, over decoding them in a thread of this process.

    python -m benchmarks.decoding

Both decode the same files in turn, one at a time and eight at once; the pool, too, decodes small PNGs and JPEGs here.
"""

import asyncio
import io
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from statistics import median

import anyio.to_thread
import numpy as np
from PIL import Image
from pydantic import Field

from services.protocol.decoding.pool import DecodingPool
from services.protocol.images import decode_sized
from services.settings import Config, read
from training.measure.results import align

_SIZE = (224, 224)
_AT_ONCE = 8
_WARM_UP = 3


class Decoding(Config):
    """Compares decoding in worker processes with decoding in a thread."""

    rounds: int = Field(50, ge=1, description="files each way, one at a time and eight at once")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    config = read(Decoding, argv, prog="python -m benchmarks.decoding")
    print(align(asyncio.run(_measure(config.rounds))))
    return 0


async def _measure(rounds: int) -> list[list[str]]:
    lines = [["", "in a thread", "by the pool", "ratio", f"files a second, {_AT_ONCE} at once: ratio"]]
    async with DecodingPool(2) as pool:
        for side in (64, 512, 2048):
            for kind in ("PNG", "JPEG", "TIFF"):
                data = _file(side, kind)
                ways: tuple[Callable[[], Awaitable[object]], ...] = (
                    partial(anyio.to_thread.run_sync, partial(decode_sized, data, channels=1, size=_SIZE)),
                    partial(pool.decode, data, channels=1, size=_SIZE),
                )
                seconds = [await _seconds(ways, rounds, at_once) for at_once in (1, _AT_ONCE)]
                thread, pooled = seconds[0]
                lines.append(
                    [
                        f"{kind} of {side} x {side}",
                        f"{thread * 1000:.2f} ms",
                        f"{pooled * 1000:.2f} ms",
                        f"{pooled / thread:.2f}",
                        f"{seconds[1][0] / seconds[1][1]:.2f}",
                    ]
                )
    return lines


def _file(side: int, kind: str) -> bytes:
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(0).normal(scale=4, size=(side, side))
    buffer = io.BytesIO()
    Image.fromarray((127 + 100 * np.sin(9 * x) * np.cos(7 * y) + noise).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


async def _seconds(ways: Sequence[Callable[[], Awaitable[object]]], rounds: int, at_once: int) -> list[float]:
    """Median seconds of each way for so many files at once."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(_WARM_UP + rounds):
        for way, kept in zip(ways, taken, strict=True):
            begun = time.perf_counter()
            await asyncio.gather(*(way() for _ in range(at_once)))
            kept.append(time.perf_counter() - begun)
    return [median(kept[_WARM_UP:]) for kept in taken]


if __name__ == "__main__":
    sys.exit(main())
