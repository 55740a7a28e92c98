"""Files that are small here and large, slow or endless in a decoder, each given to a pool with tight limits."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from dicom_files import compressed, dicom, encapsulated, item, raw_encapsulated
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from services.protocol.decoding.pool import DecodingPool, Limits
from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia

pytestmark = pytest.mark.anyio

GREY = np.arange(64 * 48, dtype=np.uint16).astype(np.uint8).reshape(64, 48)
SIDE = 6000
HUGE = np.broadcast_to(np.uint8(0), (SIDE, SIDE))
RUN = b"\xfd\x07"


def described(frame: bytes, syntax: object = JPEG2000Lossless, side: int = SIDE) -> bytes:
    return encapsulated([frame], syntax, GREY, Rows=side, Columns=side)


def sized(*, tile: int = SIDE) -> bytes:
    """A JPEG 2000 stream that claims to be much larger than it is."""
    frame = bytearray(compressed(GREY, "JPEG2000", no_jp2=True))
    struct.pack_into(">8I", frame, frame.index(b"\xff\x51") + 6, SIDE, SIDE, 0, 0, tile, tile, 0, 0)
    return bytes(frame)


def recoded(*, levels: int = 5, block: int = 4, precinct: int | None = None, layers: int = 1) -> bytes:
    """The same with another coding style: exponents of the sizes of code-blocks, less 2, and of precincts."""
    frame = sized()
    start = frame.index(b"\xff\x52")
    end = start + 2 + int.from_bytes(frame[start + 2 : start + 4], "big")
    precincts = b"" if precinct is None else bytes([precinct * 17] * (levels + 1))
    told = bytes([precinct is not None]) + struct.pack(">BHB", 0, layers, 0) + bytes([levels, block, block, 0, 1])
    told += precincts
    return frame[:start] + b"\xff\x52" + struct.pack(">H", len(told) + 2) + told + frame[end:]


def scans(count: int) -> bytes:
    """A progressive JPEG of 6000 x 6000 that goes over all of it again and again."""
    buffer = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def tiled(side: int) -> bytes:
    """A deflated TIFF of 5 x 7 pixels in one tile of that side."""
    tags = {256: 7, 257: 5, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 400, 325: 35}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)).ljust(400, b"\0") + zlib.compress(
        bytes(2**20)
    )


def element(tag: int, data: bytes | None) -> bytes:
    length = 2**32 - 1 if data is None else len(data)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length) + (data or b"")


def before_pixels(extra: bytes) -> bytes:
    data = dicom(GREY, ImplicitVRLittleEndian)
    start = data.index(struct.pack("<HHI", 0x7FE0, 0x0010, GREY.nbytes))
    return data[:start] + extra + data[start:]


EMPTY_ITEM = element(0xFFFEE000, b"")
FILES = {
    "precincts of 2 x 2": described(recoded(precinct=1)),
    "precincts of 1 x 1": described(recoded(precinct=0, levels=0)),
    "code-blocks of 4 x 4": described(recoded(block=0)),
    "65535 layers": described(recoded(layers=65535)),
    "33 levels": described(recoded(levels=33)),
    "tiles of 40 x 40": described(sized(tile=40)),
    "tiles of 1 x 1": described(sized(tile=1)),
    "a progressive JPEG": described(scans(200), JPEGBaseline8Bit),
    "a progressive JPEG, bare": scans(200),
    "runs of nothing": described(struct.pack("<16I", 1, 64, *[0] * 14) + b"\x80" * 2**23 + RUN, RLELossless, side=64),
    "runs that share their bytes": described(struct.pack("<16I", 15, *[64] * 15) + RUN * 2**20, RLELossless, side=64),
    "fragments": raw_encapsulated(item(b"") * 2**19, RLELossless, GREY),
    "an offset table": raw_encapsulated(item(bytes(2**24)), RLELossless, GREY, frames=False),
    "elements": before_pixels(element(0x7FDF0010, b"") * 2**21),
    "items": before_pixels(element(0x52009230, EMPTY_ITEM * 2**19)),
    "items of undefined length": before_pixels(element(0x52009230, None) + EMPTY_ITEM * 2**19),
    "nesting": before_pixels((element(0x00081115, None) + element(0xFFFEE000, None)) * 50_000),
    "a window of a million numbers": before_pixels(element(0x00281051, b"4 ") + element(0x00281050, b"1\\" * 2**23)),
    **{f"a tile of {side}": tiled(side) for side in (4096, 30000, 2**31)},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("name", FILES)
async def test_a_hostile_file_is_an_image_or_refused_and_the_next_one_is_read(name: str) -> None:
    async with DecodingPool(1, limits=Limits(memory_bytes=2**30, cpu_s=1)) as pool:
        with suppress(InvalidInput, TooLarge, UnsupportedMedia):
            image, _ = await pool.decode(FILES[name], channels=1, size=(8, 8))
            assert image.shape == (1, 8, 8)
        image, own = await pool.decode(dicom(GREY), channels=1, size=(64, 48))
        assert own == (64, 48)
        assert image[0] == pytest.approx(GREY / 255, abs=1e-6)
