"""The process that decodes: one file after another, within limits that the kernel keeps.

A file that exceeds them, or crashes its decoder, takes this process along and nothing else: `pool` starts another. The
socket on standard input carries both directions, and its end ends the process. Once the first file has been read, this
process is not trusted: what it sends is numbers and short texts, never pickles.

    request   REQUEST, then the file
    response  RESPONSE, then the image (channels, height, width) as float32, or a message in UTF-8
"""

import importlib
import math
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia

REQUEST: Final = struct.Struct("<QQBIII")
"""Length of the file, most pixels, channels, height and width of the result, number of the frame (0: none)."""

RESPONSE: Final = struct.Struct("<BII")
"""One of `READ`, an index in `REFUSALS`, `NO_MEMORY` and `FAILED`; height and width of the image, or 0 and the
length of the message."""

REFUSALS: Final[tuple[type[ServiceError], ...]] = (InvalidInput, TooLarge, UnsupportedMedia)
READ: Final = 200
NO_MEMORY: Final = 201
"""There was not enough memory: whatever the decoder's state is now, this process is not to be used again."""
FAILED: Final = 202
"""A fault of the program; the message is the exception's type."""

STARTED: Final = b"\1"
"""What is sent once, when files can be read."""

MESSAGE_BYTES: Final = 1000


def main() -> None:
    """Serves until the socket ends; the arguments are bytes of memory, seconds of CPU time a file, and the decoder."""
    memory, cpu_s, decoder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for one in (signal.SIGINT, signal.SIGTERM):  # which may be sent to all processes; the service ends in its own time
        signal.signal(one, signal.SIG_IGN)
    module, _, name = decoder.partition(":")
    decode = getattr(importlib.import_module(module), name)
    limit_memory(memory)
    if sys.platform == "linux":  # short of memory, the kernel is to end this process and not the service
        with suppress(OSError):  # some containers do not let it be said
            Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(1, 2)  # libraries in C print there what files say
    with socket.socket(fileno=0) as connection:
        connection.sendall(STARTED)
        while head := _receive(connection, REQUEST.size):
            length, *job = REQUEST.unpack(head)
            data = bytes(_receive(connection, length))
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_s)
            connection.sendall(_response(decode, data, job))


def limit_memory(extra: int) -> None:
    """Lets this process have so many bytes of address space more than it has now; on Linux only."""
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, now + extra)


def _limit(what: int, value: int) -> None:
    """Sets a soft limit, below the hard one that the service itself was given."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _receive(connection: socket.socket, length: int) -> bytearray:
    """So many bytes; none if the other end is closed."""
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            return bytearray()
        rest = rest[count:]
    return data


def _response(decode: Callable[..., Any], data: bytes, job: list[int]) -> bytes:
    max_pixels, channels, height, width, frame = job
    try:
        image, own = decode(data, channels=channels, size=(height, width), max_pixels=max_pixels, frame=frame or None)
        return RESPONSE.pack(READ, *own) + np.ascontiguousarray(image, "<f4").tobytes()
    except MemoryError:
        return RESPONSE.pack(NO_MEMORY, 0, 0)
    except ServiceError as error:
        status = REFUSALS.index(type(error)) if type(error) in REFUSALS else FAILED
        message = error.message if status != FAILED else type(error).__name__
    except Exception as error:  # its words may quote the file
        status, message = FAILED, type(error).__name__
    told = message.encode()[:MESSAGE_BYTES]
    return RESPONSE.pack(status, 0, len(told)) + told


if __name__ == "__main__":
    main()
