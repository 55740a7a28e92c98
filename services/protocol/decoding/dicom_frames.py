"""One frame of a DICOM file's pixel data, as stored values."""

import io
import struct
from dataclasses import dataclass
from struct import unpack_from
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.encaps import encapsulate, get_frame, parse_basic_offsets, parse_fragments
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from services.protocol.errors import InvalidInput, UnsupportedMedia

_JPEG: Final = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)
_JPEG_2000: Final = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
_FRAME_MARKERS: Final = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}  # JPEG's start of frame: sequential, progressive, lossless, LS


@dataclass(frozen=True)
class Layout:
    """What a DICOM file says of its pixels, checked to be possible.

    Attributes:
        rows: height.
        columns: width.
        frames: how many there are.
        samples: of a pixel: 1 or 3.
        allocated: bits of a sample in memory: 1, 8, 16 or 32.
        stored: bits of a sample that count, the lowest ones.
        signed: whether samples are two's complements.
        planar: 1 where each color is a plane of its own, else 0.
        photometric: what the samples mean, in DICOM's words.
    """

    rows: int
    columns: int
    frames: int
    samples: int
    allocated: int
    stored: int
    signed: bool
    planar: int
    photometric: str


@dataclass(frozen=True)
class PixelData:
    """Where the pixels of a file are.

    Attributes:
        stream: the file, or what it inflates to.
        syntax: the transfer syntax.
        start: offset in the stream of the value of the element Pixel Data.
        length: bytes of that value; None where a delimiter ends it, as with compressed frames.
        vr: its value representation; None where the syntax does not tell.
        offsets: the Extended Offset Table and its lengths; empty where there is none.
    """

    stream: io.BytesIO
    syntax: UID
    start: int
    length: int | None
    vr: str | None
    offsets: tuple[bytes, bytes]


def refuse_undecodable(syntax: UID) -> None:
    """Checks that the pixels of a transfer syntax can be decoded here.

    Raises:
        UnsupportedMedia: DICOM knows no such syntax, or no decoder for it is installed.
    """
    if syntax.type != "Transfer Syntax":  # not quoted: it may be anything
        raise UnsupportedMedia("the DICOM file's transfer syntax is none that DICOM defines")
    try:
        usable = get_decoder(syntax).is_available and (
            not syntax.is_encapsulated or syntax in (*_JPEG, *_JPEG_2000, RLELossless)
        )
    except NotImplementedError:
        usable = False
    if not usable:
        raise UnsupportedMedia(
            f"the DICOM file has the transfer syntax {syntax.name!r}, for which this service has no decoder"
        )


def stored_values(pixels: PixelData, layout: Layout, index: int) -> tuple[npt.NDArray[np.integer[Any]], str]:
    """Decodes one frame.

    Args:
        pixels: where they are; `refuse_undecodable` has passed their syntax.
        layout: what they are.
        index: the frame's, from 0.

    Returns:
        Values (rows, columns) or (rows, columns, 3), and what they mean in DICOM's words: as the layout says, unless
        the decoder changed it.

    Raises:
        InvalidInput: the pixel data is damaged, cut short, or not of this layout.
        Exception: what else pydicom and its decoders raise on damaged data.
    """
    source: bytes | memoryview
    if pixels.syntax.is_encapsulated:
        frame = _compressed(pixels, layout, index)
        _check_frame(frame, pixels.syntax, layout)
        source, index, frames, planar = encapsulate([frame]), 0, 1, 0
    elif pixels.length is None:
        raise InvalidInput("the DICOM file's PixelData has no length")
    else:
        source = pixels.stream.getbuffer()[pixels.start : pixels.start + pixels.length]
        frames, planar = layout.frames, layout.planar
    options: Any = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": frames,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "planar_configuration": planar,
        "photometric_interpretation": layout.photometric,
        "pixel_keyword": "PixelData",
        "pixel_vr": pixels.vr or "OW",
    }
    values, told = get_decoder(pixels.syntax).as_array(source, index=index, raw=True, **options)
    return values, str(told["photometric_interpretation"])


def _compressed(pixels: PixelData, layout: Layout, index: int) -> bytes:
    """The bytes of one compressed frame, its fragments joined (DICOM PS3.5, A.4)."""
    stream = pixels.stream
    stream.seek(pixels.start)
    offsets = parse_basic_offsets(stream)
    first = stream.tell()
    fragments = set(parse_fragments(stream)[1])
    extended = np.frombuffer(pixels.offsets[0], "<u8").tolist()
    # pydicom goes wherever an offset points, and takes what is there for a frame.
    if not fragments.issuperset(first + offset for offset in (*offsets, *extended)):
        raise InvalidInput("the DICOM file's offset table does not fit its fragments")
    stream.seek(pixels.start)
    return get_frame(
        stream, index, number_of_frames=layout.frames, extended_offsets=pixels.offsets if extended else None
    )


def _check_frame(frame: bytes, syntax: UID, layout: Layout) -> None:
    """Refuses a compressed frame that is not whole, or not the image that the file speaks of.

    Decoders believe the frame: they would fill what is missing with grey, or lay the pixels out in other rows.
    """
    if syntax == RLELossless:  # says nothing of itself, and pydicom counts what it expands to
        return
    if b"\xff\xd9" not in frame[-16:]:  # its end; some writers pad it
        raise InvalidInput("the DICOM file's compressed frame is cut short")
    try:
        *size, bits = _jpeg(frame) if syntax in _JPEG else _jpeg_2000(frame)
    except struct.error:
        raise _damaged() from None
    if size != [layout.rows, layout.columns, layout.samples] or bits > layout.allocated:
        raise InvalidInput("the DICOM file's compressed frame has another size or depth than the file says")


def _damaged() -> InvalidInput:
    return InvalidInput("the DICOM file's compressed frame is damaged, or not of the file's transfer syntax")


def _jpeg(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, samples and bits of a sample in a JPEG or JPEG-LS stream (ISO/IEC 10918-1, B.2)."""
    place = 2
    while True:
        start, marker, length = unpack_from(">BBH", frame, place)
        if start != 0xFF or marker == 0xDA:
            raise _damaged()
        if marker in _FRAME_MARKERS:
            bits, rows, columns, samples = unpack_from(">BHHB", frame, place + 4)
            return rows, columns, samples, bits
        place += 2 + length


def _jpeg_2000(frame: bytes) -> tuple[int, int, int, int]:
    """The same of a JPEG 2000 stream, whose components have to be alike (ISO/IEC 15444-1, A.5.1)."""
    start, size, right, bottom, left, top, samples = unpack_from(">HH4x4I16xH", frame)
    components = {unpack_from(">3B", frame, 42 + 3 * number) for number in range(samples)}
    if (start, size) != (0xFF4F, 0xFF51) or not samples:
        raise _damaged()
    if len(components) != 1 or any(step != 1 for _, *steps in components for step in steps):
        raise InvalidInput("the DICOM file's compressed frame has components of several sizes or depths")
    return bottom - top, right - left, samples, (components.pop()[0] & 0x7F) + 1
