import logging
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import SECRETS, compressed, dataset, dicom, encapsulated, written
from PIL import Image
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from services.protocol.decoding.dicom import read_frame
from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 4096, (10, 6)).astype(np.uint16)
GREY = RNG.integers(0, 256, (5, 7)).astype(np.uint8)  # an odd number of bytes
RGB = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def read(data: bytes, frame: int | None = None, max_pixels: int = 10**6) -> np.ndarray:
    return read_frame(data, frame=frame, max_pixels=max_pixels)


def refused(data: bytes, frame: int | None = None, max_pixels: int = 10**6) -> ServiceError:
    with pytest.raises((InvalidInput, TooLarge, UnsupportedMedia)) as caught:
        read(data, frame, max_pixels)
    for secret in SECRETS:
        assert secret not in caught.value.message
    return caught.value


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
def test_every_layout_of_bytes_gives_the_same_image(syntax: UID) -> None:
    values = np.float64(PIXELS)
    expected = (values - values.min()) / np.ptp(values)
    assert read(dicom(PIXELS, syntax, BitsStored=12)) == pytest.approx(expected, abs=1e-6)
    assert read(dicom(GREY, syntax)) == pytest.approx(GREY / 255, abs=1e-6)
    assert np.array_equal(read(dicom(RGB, syntax, photometric="RGB")), RGB)


def test_bits_that_do_not_count_are_not_looked_at() -> None:
    dirty = PIXELS | np.uint16(0xA000)
    assert np.array_equal(read(dicom(dirty, BitsStored=12)), read(dicom(PIXELS, BitsStored=12)))
    signed = (PIXELS.astype(np.int16) - 2048) & np.int16(0x0FFF)  # two's complements of 12 bits
    assert np.array_equal(read(dicom(signed, BitsStored=12)), read(dicom(PIXELS.astype(np.int16) - 2048)))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_samples_have_eight_to_thirty_two_bits(kind: type[np.integer]) -> None:
    values = np.array([[0, 50, 100]], kind)
    picture = read(dicom(values, WindowCenter=50.5, WindowWidth=101))
    assert picture.ravel() == pytest.approx([0, 0.5, 1])


def test_masks_of_single_bits_are_read() -> None:
    made = dataset(np.zeros((3, 5), np.uint8), BitsAllocated=1, BitsStored=1)
    bits = RNG.integers(0, 2, (3, 5)).astype(np.uint8)
    made.PixelData = np.packbits(bits.ravel(), bitorder="little").tobytes()
    made.HighBit = 0
    assert np.array_equal(read(written(made)), bits)


@pytest.mark.parametrize("syntax", NATIVE)
def test_colors_can_be_planes_and_luminance(syntax: UID) -> None:
    planes = dicom(RGB, syntax, photometric="RGB", PlanarConfiguration=1)
    assert np.array_equal(read(planes), RGB.reshape(3, 5, 7).transpose(1, 2, 0))
    ybr = np.array([[[76, 85, 255], [150, 44, 21]]], np.uint8)  # red and green, ITU-T T.871
    assert read(dicom(ybr, syntax, photometric="YBR_FULL")) == pytest.approx(
        np.array([[[254, 0, 0], [0, 255, 1]]]), abs=1.01
    )


def test_halved_colors_are_doubled() -> None:
    made = dataset(np.zeros((1, 4, 3), np.uint8), photometric="YBR_FULL_422")
    made.PixelData = bytes([76, 76, 85, 255, 150, 150, 44, 21])
    assert read(written(made)) == pytest.approx(np.array([[[254, 0, 0]] * 2 + [[0, 255, 1]] * 2]), abs=1.01)


def test_among_several_frames_there_is_no_default() -> None:
    data = dicom(RNG.integers(0, 9, (12, 4, 4)).astype(np.uint8), frames=True)
    error = refused(data)
    assert isinstance(error, InvalidInput)
    assert "12 frames" in error.message
    for number in (0, -1, 13, 10**9):
        assert "from 1 to 12" in refused(data, number).message
    assert "from 1 to 1" in refused(dicom(GREY), 2).message
    assert np.array_equal(read(dicom(GREY), 1), read(dicom(GREY)))


def test_a_file_without_a_syntax_is_invalid() -> None:
    data = dicom(GREY)
    start = data.index(b"\x02\x00\x10\x00UI")
    assert "TransferSyntaxUID" in refused(data[:start] + data[start + 28 :]).message


@pytest.mark.parametrize(
    "name", ["Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel", "PixelRepresentation"]
)
def test_what_describes_pixels_has_to_be_there(name: str) -> None:
    made = dataset(PIXELS)
    delattr(made, name)
    error = refused(written(made))
    assert isinstance(error, InvalidInput)
    assert name in error.message


@pytest.mark.parametrize(
    ("elements", "kind", "words"),
    [
        ({"Rows": 0}, InvalidInput, "no rows"),
        ({"BitsStored": 17}, InvalidInput, "BitsStored"),
        ({"BitsStored": 0}, InvalidInput, "BitsStored"),
        ({"SamplesPerPixel": 2}, InvalidInput, "SamplesPerPixel"),
        ({"NumberOfFrames": -3}, InvalidInput, "NumberOfFrames"),
        ({"NumberOfFrames": 2**31 - 1}, InvalidInput, "choose one"),
        ({"BitsAllocated": 24}, UnsupportedMedia, "BitsAllocated"),
        ({"BitsAllocated": 64}, UnsupportedMedia, "BitsAllocated"),
        ({"HighBit": 11}, UnsupportedMedia, "HighBit"),
        ({"PhotometricInterpretation": "SENTINEL COMMENT"}, UnsupportedMedia, "none of MONOCHROME1"),
        ({"PhotometricInterpretation": None}, UnsupportedMedia, "none of MONOCHROME1"),
        ({"PhotometricInterpretation": "YBR_RCT"}, InvalidInput, "SamplesPerPixel"),
        ({"Rows": 65535, "Columns": 65535}, TooLarge, "pixels"),
        ({"Rows": 11}, InvalidInput, "cut short"),
    ],
)
def test_impossible_and_unknown_pixels_are_refused(
    elements: dict[str, Any], kind: type[ServiceError], words: str
) -> None:
    made = dataset(PIXELS)
    for name, value in elements.items():
        setattr(made, name, value)
    error = refused(written(made))
    assert isinstance(error, kind)
    assert words in error.message


def test_colors_of_unknown_kinds_are_unsupported() -> None:
    assert isinstance(refused(dicom(RGB, photometric="YBR_RCT")), UnsupportedMedia)
    assert isinstance(refused(dicom(RGB.astype(np.uint16), photometric="YBR_FULL")), UnsupportedMedia)
    assert isinstance(refused(dicom(RGB.astype(np.int8), photometric="RGB")), UnsupportedMedia)


def test_pixels_can_be_missing_or_no_integers() -> None:
    made = dataset(PIXELS)
    del made.PixelData
    assert "no pixels" in refused(written(made)).message
    made.FloatPixelData = np.zeros(60, np.float32).tobytes()
    error = refused(written(made))
    assert isinstance(error, UnsupportedMedia)
    assert "floating-point" in error.message


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    assert read(dicom(GREY), max_pixels=35).shape == (5, 7)
    assert isinstance(refused(dicom(GREY), max_pixels=34), TooLarge)
    for syntax in (JPEGBaseline8Bit, JPEG2000Lossless, RLELossless):
        data = encapsulated([b"\0" * 100], syntax, GREY, Rows=30000, Columns=30000)
        assert isinstance(refused(data, max_pixels=10**8), TooLarge)
    deep = dicom(np.zeros((5, 7, 3), np.uint16), photometric="RGB")
    assert isinstance(refused(deep, max_pixels=40), TooLarge)


def test_a_deflated_bomb_is_refused_before_it_is_inflated() -> None:
    data = dicom(np.zeros((2000, 2000), np.uint8), DeflatedExplicitVRLittleEndian)
    assert len(data) < 10**5
    error = refused(data)
    assert isinstance(error, TooLarge)
    assert "inflates" in error.message
    assert read(data, max_pixels=2000 * 2000).max() == 0


def test_deflated_data_can_be_cut_short_or_damaged() -> None:
    data = dicom(PIXELS, DeflatedExplicitVRLittleEndian)
    for damaged in (data[:-20], data[:-60] + bytes(60)):
        assert isinstance(refused(damaged), InvalidInput)


def elements_before_pixels(extra: bytes) -> bytes:
    data = dicom(PIXELS, ImplicitVRLittleEndian)
    start = data.index(struct.pack("<HHI", 0x7FE0, 0x0010, PIXELS.nbytes))
    return data[:start] + extra + data[start:]


def element(tag: int, data: bytes | None) -> bytes:
    length = 2**32 - 1 if data is None else len(data)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length) + (data or b"")


def test_endless_nesting_is_refused() -> None:
    nested = (element(0x00081115, None) + element(0xFFFEE000, None)) * 5000
    assert isinstance(refused(elements_before_pixels(nested)), InvalidInput)


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
def test_every_truncation_is_refused(syntax: UID) -> None:
    data = dicom(PIXELS, syntax)
    if syntax.is_encapsulated:
        data = data[:-8]  # what is lost of the delimiter is not missed
    for length in (*range(132, len(data) - 2, 5), len(data) - 2):
        refused(data[:length])


def test_damaged_bytes_give_an_image_or_a_service_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    jpeg = encapsulated([compressed(GREY, "JPEG")], JPEGBaseline8Bit, GREY)
    jpeg_2000 = encapsulated(
        [compressed(RNG.integers(0, 256, (32, 32)).astype(np.uint8), "JPEG2000", no_jp2=True)],
        JPEG2000Lossless,
        np.zeros((32, 32), np.uint8),
    )
    for data in (
        *(dicom(PIXELS, syntax, WindowCenter=1, WindowWidth=2) for syntax in (*NATIVE, RLELossless)),
        jpeg,
        jpeg_2000,
    ):
        for _ in range(150):
            damaged = bytearray(data)
            damaged[RNG.integers(132, len(data))] = RNG.integers(256)
            with suppress(InvalidInput, TooLarge, UnsupportedMedia):
                picture = read(bytes(damaged))
                assert picture.min() >= 0
                assert picture.max() <= 255
    assert not caplog.records


PROGRAM = """
import logging, sys, warnings
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
warnings.simplefilter("always")
from services.protocol.errors import ServiceError
from services.protocol.images import decode_sized
for path in sys.argv[1:]:
    try:
        decode_sized(Path(path).read_bytes(), channels=1, size=(8, 8))
        print("read")
    except ServiceError as error:
        print(error.status, error.message)
"""


def test_no_log_warning_or_error_quotes_a_file(tmp_path: Path) -> None:
    """In a process of its own that shows every warning and every message of every library."""
    plain = dicom(PIXELS, WindowCenter="11111111", WindowWidth="4")
    tagged = Image.Exif()
    tagged[0x010E] = SECRETS[0]
    notes = {kind: compressed(GREY, kind, exif=tagged) for kind in ("PNG", "JPEG", "TIFF")}
    files = [
        plain,
        plain.replace(b"11111111", b"SENTINEL"),
        plain.replace(b"1.2.840.10008.1.2.1\0", b"SENTINEL ".ljust(20)),
        plain.replace(b"MONOCHROME2 ", b"SENTINEL".ljust(12)),
        plain.replace(b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00DS\x08\x00SENTINEL"),
        plain.replace(b"\x10\x00\x10\x00PN", b"\x28\x00\x10\x00PN"),
        plain[:-9],
        plain[:600],
        dicom(PIXELS, RLELossless)[:-9],
        encapsulated([b"SENTINEL" * 9], RLELossless, PIXELS),
        encapsulated([b"\xff\xd8SENTINEL\xff\xd9"], JPEGBaseline8Bit, GREY),
        *(one for data in notes.values() for one in (data, data[:-20])),
    ]
    paths = [tmp_path / str(number) for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    done = subprocess.run(command, cwd=Path(__file__).parents[5], capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert len(told) == len(files)
    assert told.count("read") >= 4
    assert not any(one.startswith("5") for one in told)
    assert "SENTINEL" not in done.stdout + done.stderr


def test_a_zlib_error_is_no_internal_error() -> None:
    data = dicom(PIXELS, DeflatedExplicitVRLittleEndian)
    with pytest.raises(zlib.error):
        zlib.decompress(data, -15)
    refused(data[:400] + b"\xff" * 40)
