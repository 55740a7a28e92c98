"""Decoders that go wrong in all ways, to run in the worker processes of a pool: `data` says how."""

import os
import signal
import sys
import time
from typing import Any

import numpy as np

import services.protocol.images  # noqa: F401 - what the services' own decoder imports
from services.protocol.errors import UnsupportedMedia


def decode(data: bytes, *, channels: int, size: tuple[int, int], **_: Any) -> tuple[np.ndarray, tuple[int, int]]:
    image = np.full((channels, *size), 0.25, np.float32)
    match data:
        case b"memory":
            bytearray(2**34)
        case b"memory without end":
            hoard = []
            while True:
                hoard.append(bytes(2**24))
        case b"killed for memory":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"time":
            while True:
                pass
        case b"hang":
            time.sleep(3600)
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"exit":
            os._exit(0)
        case b"fault":
            raise KeyError("a patient's name")
        case b"refusal":
            raise UnsupportedMedia("nothing for ä " + "x" * 2000)
        case b"nonsense":
            image[...] = np.nan
        case b"no size":
            return image, (0, 0)
        case b"garbage":
            os.write(0, os.urandom(2**16))
        case b"modules":
            heavy = ("torch", "pydicom", "fastapi", "services.protocol.oip", "asyncio")
            image[...] = sum(name in sys.modules for name in heavy) / 8
        case b"environment":
            image[...] = "SECRET" in os.environ
        case b"who":
            return image, (os.getpid(), 1)
        case _:
            pass
    return image, (7, len(data))
