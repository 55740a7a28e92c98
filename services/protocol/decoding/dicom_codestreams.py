"""What compressed frames say of themselves, held against what the DICOM file says of its pixels before decoding.

Decoders believe a frame: one of 200 bytes can claim 65535 x 65535 pixels, or, in JPEG 2000, cut a modest image into
millions of precincts that take gigabytes. The markers before the data say all that, and cost nothing to read. They are
read strictly: whoever skips what he does not know can be led to see other markers than the decoder does.
"""

import struct
from struct import unpack_from
from typing import Final

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

from services.protocol.errors import InvalidInput, TooLarge

Claim = tuple[int, int, int, int]
"""Rows, columns, samples of a pixel, and bits of a sample."""

_MAX_MARKERS = 2**18
_MAX_SCANS = 16
_MAX_RUNS = 2**24  # some seconds
_MAX_TILES = 2**14
_MAX_BLOCKS = 2**18  # code-blocks of a component: some 150 MB in OpenJPEG
_MAX_PACKETS = 2**22  # code-blocks times quality layers

# Start-of-frame markers by syntax. None has the progressive ones: their many passes over an image can take hours.
_JPEG: Final[dict[UID, tuple[int, ...]]] = {
    JPEGBaseline8Bit: (0xFFC0,),
    JPEGExtended12Bit: (0xFFC0, 0xFFC1),
    JPEGLossless: (0xFFC3,),
    JPEGLosslessSV1: (0xFFC3,),
    JPEGLSLossless: (0xFFF7,),
    JPEGLSNearLossless: (0xFFF7,),
}
_JPEG_2000 = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
# What may stand before the first scan beside the frame: tables, the restart interval, applications' data, comments.
_JPEG_TABLES = (0xFFC4, 0xFFCC, 0xFFDB, 0xFFDD, 0xFFF8, 0xFFFE, *range(0xFFE0, 0xFFF0))
# CAP, TLM, PLM, PLT, CPF, QCD, QCC, RGN, POC, PPM, PPT, CRG, COM: nothing that a decoder's memory depends on.
_J2K_TABLES = (0xFF50, 0xFF55, 0xFF57, 0xFF58, 0xFF59, 0xFF5C, 0xFF5D, 0xFF5E, 0xFF5F, 0xFF60, 0xFF61, 0xFF63, 0xFF64)
_SOS, _SOC, _SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFFDA, 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9

SYNTAXES: Final = (*_JPEG, *_JPEG_2000, RLELossless)
"""The transfer syntaxes whose frames can be checked."""


def check_frame(frame: bytes, syntax: UID, claim: Claim) -> None:
    """Checks that a compressed frame can be decoded in bounded memory and time.

    Args:
        frame: the frame, its fragments joined.
        syntax: one of `SYNTAXES`.
        claim: what the file says of its pixels; the bits are those of a sample in memory.

    Raises:
        InvalidInput: the frame is damaged, cut short, or of another syntax, size or depth.
        TooLarge: decoding it could take too much memory or too long.
    """
    try:
        if syntax == RLELossless:
            _check_rle(frame, claim)
            return
        if b"\xff\xd9" not in frame[-16:]:  # its end; some writers pad it
            raise InvalidInput("the DICOM file's compressed frame is cut short")
        *size, bits = _jpeg(frame, _JPEG[syntax]) if syntax in _JPEG else _jpeg_2000(frame)
    except (struct.error, IndexError):
        raise _damaged() from None
    if size != list(claim[:3]) or bits > claim[3]:
        raise InvalidInput("the DICOM file's compressed frame has another size or depth than the file says")


def _damaged() -> InvalidInput:
    return InvalidInput("the DICOM file's compressed frame is damaged, or not of the file's transfer syntax")


def _jpeg(frame: bytes, kinds: tuple[int, ...]) -> Claim:
    """Reads a JPEG or JPEG-LS stream up to its first scan (ISO/IEC 10918-1, B.2)."""
    place, claim = 2, None
    for _ in range(_MAX_MARKERS):
        marker, length = unpack_from(">HH", frame, place)
        if marker == _SOS and claim is not None:
            if frame.count(b"\xff\xda") > _MAX_SCANS:
                raise TooLarge("the DICOM file's compressed frame has too many scans")
            return claim
        if marker in kinds and claim is None:
            bits, rows, columns, samples = unpack_from(">BHHB", frame, place + 4)
            claim = rows, columns, samples, bits
        elif marker not in _JPEG_TABLES or length < 2:
            break
        place += 2 + length
    raise _damaged()


def _jpeg_2000(frame: bytes) -> Claim:
    """Reads the headers of a JPEG 2000 stream and of all its tile-parts (ISO/IEC 15444-1, A.4 to A.6)."""
    start, size, length, _, right, bottom, left, top, *tile, samples = unpack_from(">4H8IH", frame)
    if (start, size) != (_SOC, _SIZ) or length != 38 + 3 * samples or not (tile[0] and tile[1]):
        raise _damaged()
    components = {unpack_from(">3B", frame, 42 + 3 * number) for number in range(samples)}
    if len(components) != 1 or any(step != 1 for _, *steps in components for step in steps):
        raise InvalidInput("the DICOM file's compressed frame has components of several sizes or depths")
    rows, columns = bottom - top, right - left
    tiles = -(-(bottom - tile[3]) // tile[1]), -(-(right - tile[2]) // tile[0])
    if not (0 < tiles[0] <= _MAX_TILES and 0 < tiles[1] <= _MAX_TILES // tiles[0]):
        raise TooLarge("the DICOM file's compressed frame has too many tiles")
    place, part, layers = 4 + length, (0, 0), 0
    for _ in range(_MAX_MARKERS):
        (marker,) = unpack_from(">H", frame, place)
        done = marker == _EOC or (marker == _SOD and part[1] == 0)  # a last tile-part may leave its length open
        if done and part[0] and layers:
            return rows, columns, samples, (components.pop()[0] & 0x7F) + 1
        if marker == _SOD and part[0] + part[1] > place:
            place = sum(part)
            continue
        (length,) = unpack_from(">H", frame, place + 2)
        if marker == _SOT:
            part = place, unpack_from(">I", frame, place + 6)[0]
        elif marker == _COD:
            style, _, layers = unpack_from(">BBH", frame, place + 4)
            _check_coding(frame, place + 9, bool(style & 1), layers, (rows, columns), tiles)
        elif marker == _COC:
            place_of_style = place + (5 if samples < 257 else 6)
            style = frame[place_of_style]
            _check_coding(frame, place_of_style + 1, bool(style & 1), layers, (rows, columns), tiles)
        elif marker not in _J2K_TABLES or length < 2:
            break
        place += 2 + length
    raise _damaged()


def _check_coding(
    frame: bytes, place: int, precincts: bool, layers: int, size: tuple[int, int], tiles: tuple[int, int]
) -> None:
    """Counts the code-blocks of a component, which precincts make smaller (ISO/IEC 15444-1, table A.20 and B.7)."""
    levels, *block = unpack_from(">3B", frame, place)
    if levels > 32:
        raise _damaged()
    blocks = 0
    for level in range(levels + 1):
        detail = int(level > 0)  # three subbands of half the size; the lowest level has one
        sides = 3 if detail else 1
        bounds = (frame[place + 5 + level] & 15, frame[place + 5 + level] >> 4) if precincts else (15, 15)
        for length, exponent, bound, count in zip(size[::-1], block, bounds, tiles[::-1], strict=True):
            side = min(exponent + 2, max(bound - detail, 0))
            sides *= (length >> (levels - level + detail + side)) + 1 + count
        blocks += sides
    if blocks > _MAX_BLOCKS or blocks * layers > _MAX_PACKETS:
        raise TooLarge("the DICOM file's compressed frame is cut into too many parts")


def _check_rle(frame: bytes, claim: Claim) -> None:
    """Counts what the segments of an RLE frame expand to, which can be 64 times their size (DICOM PS3.5, annex G)."""
    rows, columns, samples, bits = claim
    count, *starts = unpack_from("<16I", frame)
    if count != samples * (bits // 8):
        raise InvalidInput("the DICOM file's compressed frame has another depth than the file says")
    runs = 0
    for place, end in zip(starts[:count], [*starts[1:count], len(frame)], strict=True):
        if end > len(frame):
            raise _damaged()
        produced = 0
        while place < end and produced < rows * columns:
            head = frame[place]
            runs += 1
            if runs > _MAX_RUNS:
                raise TooLarge("the DICOM file's compressed frame has too many runs")
            place += head + 2 if head < 128 else 1 + (head > 128)
            produced += head + 1 if head < 128 else (257 - head) % 129
        if produced < rows * columns or end - place > 2:  # a segment and a frame may each be padded
            raise _damaged()
