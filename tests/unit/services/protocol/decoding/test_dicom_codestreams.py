import struct

import numpy as np
import pytest
from dicom_files import compressed
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from services.protocol.decoding import dicom_codestreams
from services.protocol.decoding.dicom_codestreams import Claim, check_frame
from services.protocol.errors import InvalidInput, TooLarge

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (64, 48)).astype(np.uint8)
COLOR = RNG.integers(0, 256, (64, 48, 3)).astype(np.uint8)
CLAIM = (64, 48, 1, 8)


JPEG = compressed(GREY, "JPEG")
J2K = compressed(GREY, "JPEG2000", no_jp2=True)


def at(data: bytes, marker: int) -> int:
    return data.index(struct.pack(">H", marker))


def refused(frame: bytes, syntax: UID, claim: Claim = CLAIM, kind: type[Exception] = InvalidInput) -> None:
    with pytest.raises(kind):
        check_frame(frame, syntax, claim)


@pytest.mark.parametrize(
    ("frame", "syntax", "claim"),
    [
        (JPEG, JPEGBaseline8Bit, CLAIM),
        (JPEG, JPEGExtended12Bit, CLAIM),
        (JPEG + b"\0\0", JPEGBaseline8Bit, CLAIM),
        (JPEG, JPEGBaseline8Bit, (64, 48, 1, 16)),
        (compressed(COLOR, "JPEG"), JPEGBaseline8Bit, (64, 48, 3, 8)),
        (J2K, JPEG2000, CLAIM),
        (J2K, HTJ2K, CLAIM),
        (compressed(COLOR, "JPEG2000", no_jp2=True), JPEG2000Lossless, (64, 48, 3, 8)),
        (
            compressed(GREY.repeat(9, 0), "JPEG2000", no_jp2=True, tile_size=(32, 32), precinct_size=(64, 64)),
            JPEG2000,
            (576, 48, 1, 8),
        ),
        (compressed(GREY.astype(np.uint16), "JPEG2000", no_jp2=True), JPEG2000, (64, 48, 1, 16)),
    ],
)
def test_honest_frames_pass(frame: bytes, syntax: UID, claim: Claim) -> None:
    check_frame(frame, syntax, claim)


@pytest.mark.parametrize("claim", [(48, 64, 1, 8), (64, 49, 1, 8), (64, 48, 3, 8), (64, 48, 1, 1)])
@pytest.mark.parametrize(("frame", "syntax"), [(JPEG, JPEGBaseline8Bit), (J2K, JPEG2000)])
def test_frames_of_another_layout_are_refused(frame: bytes, syntax: UID, claim: Claim) -> None:
    refused(frame, syntax, claim)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000])
def test_frames_of_another_process_are_refused(syntax: UID) -> None:
    refused(JPEG, syntax)
    refused(compressed(GREY, "JPEG", progressive=True), JPEGBaseline8Bit)
    refused(J2K, JPEGBaseline8Bit)


@pytest.mark.parametrize(("frame", "syntax"), [(JPEG, JPEGBaseline8Bit), (J2K, JPEG2000)])
def test_every_truncation_is_refused(frame: bytes, syntax: UID) -> None:
    for length in range(len(frame) - 1):
        refused(frame[:length], syntax)


def test_a_jpeg_has_one_frame_before_its_few_scans() -> None:
    start = at(JPEG, 0xFFC0)
    sof = JPEG[start : start + 2 + struct.unpack(">H", JPEG[start + 2 : start + 4])[0]]
    refused(JPEG.replace(sof, sof + sof), JPEGBaseline8Bit)
    refused(JPEG.replace(sof, b""), JPEGBaseline8Bit)
    refused(JPEG.replace(sof, b"\xff\xde" + sof[2:] + sof), JPEGBaseline8Bit)  # hierarchical
    refused(JPEG.replace(b"\xff\xd9", b"\xff\xda\0\0" * 20 + b"\xff\xd9"), JPEGBaseline8Bit, kind=TooLarge)


def patched(frame: bytes, marker: int, offset: int, layout: str, *values: int) -> bytes:
    """The frame with other numbers in the first segment of a marker."""
    changed = bytearray(frame)
    struct.pack_into(layout, changed, at(frame, marker) + offset, *values)
    return bytes(changed)


def recoded(frame: bytes, *, levels: int = 5, block: int = 4, precinct: int | None = None, layers: int = 1) -> bytes:
    """The frame with another coding style: exponents of the sizes of code-blocks, less 2, and of precincts."""
    start = at(frame, 0xFF52)
    length = struct.unpack(">H", frame[start + 2 : start + 4])[0]
    return frame[:start] + style(levels, block, precinct, layers) + frame[start + 2 + length :]


def style(levels: int, block: int, precinct: int | None, layers: int, marker: bytes = b"\xff\x52") -> bytes:
    precincts = b"" if precinct is None else bytes([precinct * 17] * (levels + 1))
    own = bytes([levels, block, block, 0, 1]) + precincts
    flag = bytes([precinct is not None])
    told = flag + struct.pack(">BHB", 0, layers, 0) + own if marker == b"\xff\x52" else b"\0" + flag + own
    return marker + struct.pack(">H", len(told) + 2) + told


def sized(side: int) -> bytes:
    return patched(J2K, 0xFF51, 6, ">8I", side, side, 0, 0, side, side, 0, 0)


def test_an_image_that_is_cut_into_too_many_parts_is_refused() -> None:
    large = (6000, 6000, 1, 8)
    check_frame(recoded(sized(6000)), JPEG2000, large)
    check_frame(recoded(sized(6000), precinct=7, block=3, layers=12), JPEG2000, large)
    refused(recoded(sized(6000), precinct=1), JPEG2000, large, TooLarge)
    refused(recoded(sized(6000), precinct=0, levels=0), JPEG2000, large, TooLarge)
    refused(recoded(sized(6000), block=0), JPEG2000, large, TooLarge)
    refused(recoded(sized(6000), layers=65535), JPEG2000, large, TooLarge)
    refused(recoded(sized(6000), levels=33), JPEG2000, large)


@pytest.mark.parametrize("marker", [b"\xff\x52", b"\xff\x53"])
@pytest.mark.parametrize("place", ["main header", "tile-part"])
def test_every_coding_style_is_looked_at(marker: bytes, place: str) -> None:
    frame = sized(6000)
    for precinct, kind in ((8, None), (1, TooLarge)):
        more = style(5, 4, precinct, 1, marker)
        start = at(frame, 0xFF90)
        if place == "main header":
            changed = frame[:start] + more + frame[start:]
        else:
            part = struct.unpack(">I", frame[start + 6 : start + 10])[0]
            changed = frame[: start + 12] + more + frame[start + 12 :]
            if part:
                changed = patched(changed, 0xFF90, 6, ">I", part + len(more))
        if kind is None:
            check_frame(changed, JPEG2000, (6000, 6000, 1, 8))
        else:
            refused(changed, JPEG2000, (6000, 6000, 1, 8), kind)


def test_jpeg_2000_images_have_few_tiles_and_alike_components() -> None:
    refused(patched(sized(6000), 0xFF51, 22, ">2I", 40, 40), JPEG2000, (6000, 6000, 1, 8), TooLarge)
    refused(patched(J2K, 0xFF51, 22, ">2I", 0, 0), JPEG2000)
    refused(patched(J2K, 0xFF51, 41, ">2B", 2, 2), JPEG2000)
    color = compressed(COLOR, "JPEG2000", no_jp2=True)
    refused(patched(color, 0xFF51, 43, ">B", 11), JPEG2000, (64, 48, 3, 16))
    refused(compressed(GREY, "JPEG2000"), JPEG2000)  # in boxes, which DICOM does not allow


def test_jpeg_2000_markers_are_read_strictly() -> None:
    start = at(J2K, 0xFF5C)
    refused(J2K[:start] + b"\xff\x70\0\x04\0\0" + J2K[start:], JPEG2000)
    refused(J2K[:start] + b"\xff\x64\0\0" + J2K[start:], JPEG2000)
    refused(J2K.replace(b"\xff\x52", b"\xff\x64"), JPEG2000)  # no coding style, but a comment
    for length in (0, 1, 11):
        changed = patched(J2K, 0xFF90, 6, ">I", length)
        if length == 0:
            check_frame(changed, JPEG2000, CLAIM)  # up to the end
        else:
            refused(changed, JPEG2000)


def rle(*segments: bytes, count: int | None = None) -> bytes:
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    number = len(segments) if count is None else count
    return struct.pack("<16I", number, *starts, *[0] * (15 - len(segments))) + b"".join(segments)


RUN = b"\xfd\x07"  # 4 times 7
LITERAL = b"\x03abcd"


@pytest.mark.parametrize(
    "segment", [RUN * 2, LITERAL * 2, RUN + LITERAL, b"\x80" + RUN + b"\x80\x80" + RUN, RUN * 2 + b"\0"]
)
def test_honest_segments_pass(segment: bytes) -> None:
    check_frame(rle(segment), RLELossless, (2, 4, 1, 8))
    check_frame(rle(segment, segment), RLELossless, (2, 4, 1, 16))
    check_frame(rle(segment, RUN * 2, LITERAL * 2), RLELossless, (4, 2, 3, 8))


@pytest.mark.parametrize(
    "frame",
    [
        rle(RUN),
        rle(RUN * 2 + b"\x81\0" * 1000),
        rle(RUN * 2, RUN * 2),
        rle(RUN * 2, count=0),
        rle(RUN * 2, count=15),
        struct.pack("<16I", 1, 70, *[0] * 14) + RUN,
        struct.pack("<16I", 1, 2**32 - 1, *[0] * 14) + RUN,
    ],
)
def test_segments_that_expand_to_something_else_are_refused(frame: bytes) -> None:
    refused(frame, RLELossless, (2, 4, 1, 8))


def test_segments_cannot_share_their_bytes() -> None:
    refused(struct.pack("<16I", 2, 64, 64, *[0] * 13) + RUN * 2, RLELossless, (2, 4, 1, 16))
    refused(struct.pack("<16I", 2, 64, 10**6, *[0] * 13) + RUN * 2, RLELossless, (2, 4, 1, 16))


def test_endless_runs_of_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_codestreams, "_MAX_RUNS", 1000)
    refused(rle(b"\x80" * 1000 + RUN * 2), RLELossless, (2, 4, 1, 8), TooLarge)
