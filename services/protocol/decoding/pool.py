"""Processes that decode foreign files within hard limits of memory and time, for all formats alike.

A decoder's worst case is the file's choice: gigabytes of memory, hours, or a crash. Here that ends one process, which
is replaced at once, and the request that brought the file; other requests do not notice. Small PNGs and sequential
JPEGs, whose cost their headers bound, are decoded in this process, in a thread.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, Self

import anyio.to_thread
import numpy as np
import numpy.typing as npt

from services.protocol.decoding import worker
from services.protocol.errors import InvalidInput, ServiceError, TooLarge, Unavailable
from services.protocol.images import MAX_PIXELS, decode_plain, looks_plain

Decoded = tuple[npt.NDArray[np.float32], tuple[int, int]]
"""An image (channels, height, width) in [0,1], and the (height, width) that the file itself has."""

_MEMORY_BYTES: Final = 3 * 2**30  # JPEG 2000 in colors takes 61 bytes a pixel, 2.3 GiB for `MAX_PIXELS`
_ENDING_S: Final = 5.0
_CLOSED: Final = "the service is shutting down"
_CRASHED: Final = "the image cannot be decoded: it crashes its decoder; save it anew with another program"
_NO_MEMORY: Final = "decoding the image takes more memory than it may: send fewer pixels, or a PNG of them"
_NO_TIME: Final = "decoding the image takes longer than it may: send fewer pixels, or a PNG of them"


@dataclass(frozen=True)
class Limits:
    """What decoding one file may take.

    Attributes:
        memory_bytes: address space beyond what the process has when it starts.
        cpu_s: seconds of CPU time, whole ones.
        wall_s: seconds on the clock; more than of CPU time, because the machine may be busy.
    """

    memory_bytes: int = _MEMORY_BYTES
    cpu_s: int = 20
    wall_s: float = 120.0

    @classmethod
    def for_files(cls, largest: int) -> Self:
        """Limits for files of at most so many bytes, of which a decoder may make three copies."""
        return cls(memory_bytes=_MEMORY_BYTES + 3 * largest)


class DecodingPool:
    """A few worker processes, each started when it is first needed. An async context manager: it works inside only.

    Args:
        workers: how many.
        limits: of each file; by default those of `Limits`.
        decoder: the function that they run, as "module:name"; called as `images.decode_sized` is.
    """

    def __init__(
        self, workers: int, *, limits: Limits | None = None, decoder: str = "services.protocol.images:decode_sized"
    ) -> None:
        """Starts nothing yet."""
        self._workers = [_Worker(limits or Limits(), decoder) for _ in range(workers)]
        self._free: asyncio.LifoQueue[_Worker] | None = None  # the last one used first: it is running

    async def __aenter__(self) -> Self:
        """Opens the pool."""
        self._free = asyncio.LifoQueue()
        for one in self._workers:
            self._free.put_nowait(one)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends all workers, whatever they are doing."""
        free, self._free = self._free, None
        for one in self._workers:
            one.kill()
        if free is not None:
            for _ in self._workers:  # until nobody uses them
                await free.get()
        await asyncio.gather(*(one.close() for one in self._workers))

    async def decode(
        self,
        data: bytes,
        *,
        channels: int,
        size: tuple[int, int],
        max_pixels: int = MAX_PIXELS,
        frame: int | None = None,
    ) -> Decoded:
        """`images.decode_sized` within limits; a call that is cancelled ends the worker that is busy with it.

        Raises:
            InvalidInput: also where the file crashes its decoder.
            TooLarge: also where it takes too much memory or time.
            UnsupportedMedia: as there.
            Unavailable: the pool is closed.
        """
        if looks_plain(data, frame):
            plain = await anyio.to_thread.run_sync(partial(decode_plain, data, channels=channels, size=size))
            if plain is not None:
                return plain
        free = self._free
        if free is None:
            raise Unavailable(_CLOSED)
        head = worker.REQUEST.pack(len(data), max_pixels, channels, *size, frame or 0)
        one = await free.get()
        try:
            return await one.decode(head, data, (channels, *size), max_pixels)
        finally:
            free.put_nowait(one)


class _Process:
    """A running worker, and the socket to it."""

    def __init__(self, limits: Limits, decoder: str) -> None:
        """Starts it; it sends `worker.STARTED` when it is ready."""
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-m", worker.__name__, str(limits.memory_bytes), str(limits.cpu_s), decoder],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # None of the service's secrets, and one thread, as the stacks of others would count as memory.
                env={
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "PATH": os.environ.get("PATH", ""),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self, buffer: memoryview) -> None:
        """Fills the buffer; raises EOFError if the process ends before."""
        loop = asyncio.get_running_loop()
        while buffer:
            count = await loop.sock_recv_into(self._socket, buffer)
            if not count:
                raise EOFError
            buffer = buffer[count:]

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def end(self, grace_s: float) -> int:
        """Kills the process unless it ends by itself; its exit code, a signal's number negated. Blocks."""
        self._socket.close()
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class _Worker:
    """A place in the pool: one process at a time."""

    def __init__(self, limits: Limits, decoder: str) -> None:
        self._limits, self._decoder = limits, decoder
        self._started: asyncio.Task[_Process] | None = None
        self._endings: set[asyncio.Task[int]] = set()
        self._closed = False

    async def decode(self, head: bytes, data: bytes, shape: tuple[int, int, int], max_pixels: int) -> Decoded:
        process = await self._running()
        image = np.empty(shape, np.float32)
        response = bytearray(worker.RESPONSE.size)
        try:
            async with asyncio.timeout(self._limits.wall_s):
                await process.send(head)
                await process.send(data)
                await process.receive(memoryview(response))
                status, *numbers = worker.RESPONSE.unpack(response)
                if status == worker.READ:
                    await process.receive(image.data.cast("B"))
                    return _checked(image, (numbers[0], numbers[1]), max_pixels)
                message = bytearray(min(numbers[1], worker.MESSAGE_BYTES))
                await process.receive(memoryview(message))
        except TimeoutError:
            self._replace(process)
            raise TooLarge(_NO_TIME) from None
        except (EOFError, OSError):
            code = await self._replace(process, _ENDING_S)
            raise (Unavailable(_CLOSED) if self._closed else _cause(code)) from None
        except BaseException:  # nobody waits for it any more, or it does not respond as it should
            self._replace(process)
            raise
        if status < len(worker.REFUSALS):
            raise worker.REFUSALS[status](message.decode(errors="replace"))
        self._replace(process)
        if status == worker.NO_MEMORY:
            raise TooLarge(_NO_MEMORY)
        raise RuntimeError(f"decoding an image failed: {message!r}")

    async def _running(self) -> _Process:
        """A process that waits for a file; one that ended between two files is replaced."""
        while not self._closed:
            if self._started is None:
                self._started = asyncio.create_task(self._start())
            try:
                process = await asyncio.shield(self._started)  # whoever gives up leaves it to those who come next
            except Exception:
                self._started = None
                raise
            if process.is_alive() and not self._closed:
                return process
            self._replace(process)
        raise Unavailable(_CLOSED)

    async def _start(self) -> _Process:
        process = await anyio.to_thread.run_sync(_Process, self._limits, self._decoder)
        try:
            await process.receive(memoryview(bytearray(len(worker.STARTED))))
        except BaseException as error:
            await self._end(process)
            if isinstance(error, EOFError | OSError):
                raise ServiceError("a decoding process ended before it was ready; its log says why") from error
            raise
        return process

    def _replace(self, process: _Process, grace_s: float = 0) -> asyncio.Task[int]:
        """Ends a process that must not be used again, and starts the next one."""
        self._started = None if self._closed else asyncio.create_task(self._start())
        return self._end(process, grace_s)

    def _end(self, process: _Process, grace_s: float = 0) -> asyncio.Task[int]:
        task = asyncio.create_task(anyio.to_thread.run_sync(process.end, grace_s))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        return task

    def kill(self) -> None:
        """Kills the process, so that whoever waits for it is told, and starts no other."""
        self._closed = True
        if (process := self._ready()) is not None:
            process.kill()

    async def close(self) -> None:
        """Waits until no process is left; nobody uses the worker any more."""
        if (process := self._ready()) is not None:
            self._end(process)
        elif self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        self._started = None
        await asyncio.gather(*self._endings)

    def _ready(self) -> _Process | None:
        started = self._started
        return started.result() if started is not None and started.done() and not started.exception() else None


def _checked(image: npt.NDArray[np.float32], own: tuple[int, int], max_pixels: int) -> Decoded:
    """What a worker sent, which need not be what an honest one sends."""
    if not (min(own) > 0 and own[0] * own[1] <= max_pixels and ((image >= 0) & (image <= 1)).all()):
        raise InvalidInput(_CRASHED)
    return image, own


def _cause(code: int) -> ServiceError:
    """Why a process has ended, by its exit code."""
    if code == -signal.SIGXCPU:
        return TooLarge(_NO_TIME)
    return TooLarge(_NO_MEMORY) if code == -signal.SIGKILL else InvalidInput(_CRASHED)  # the kernel's, short of memory
