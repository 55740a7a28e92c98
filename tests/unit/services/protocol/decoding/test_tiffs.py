import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia
from services.protocol.images import decode_sized

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7)).astype(np.uint16)
COMPRESSIONS = [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"]


def tiff(values: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


def decoded(data: bytes, channels: int = 1) -> np.ndarray:
    image, own = decode_sized(data, channels=channels, size=(5, 7))
    assert own == (5, 7)
    assert image.dtype == np.float32
    return image if channels == 3 else image[0]


def handmade(values: np.ndarray, order: str = "<", extra: tuple[tuple[int, int, int], ...] = (), **tags: int) -> bytes:
    """A TIFF of grey values in one strip; `extra` are more tags (number, type, value)."""
    numbers = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "format": 339}
    shape = {"width": values.shape[1], "height": values.shape[0], "bits": 8 * values.itemsize, "compression": 1}
    entries = [(numbers[name], 4, value) for name, value in ({**shape, "photometric": 1, "format": 1} | tags).items()]
    if not extra:
        entries += [(273, 4, 400), (278, 4, values.shape[0]), (279, 4, values.nbytes)]
    entries = sorted([*entries, (277, 4, 1), *extra])
    packed = b"".join(struct.pack(f"{order}HHII", number, kind, 1, value) for number, kind, value in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    return (head + packed + bytes(4)).ljust(400, b"\0") + data


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_grey_and_color_are_read(compression: str | None) -> None:
    assert np.array_equal(decoded(tiff(GREY, compression=compression)), GREY / np.float32(255))
    assert np.array_equal(decoded(tiff(DEEP, compression=compression)), DEEP / np.float32(65535))
    color = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert np.array_equal(decoded(tiff(color, compression=compression), 3), color.transpose(2, 0, 1) / np.float32(255))
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(decoded(tiff(bits, compression=compression)), GREY > 127)
    assert decoded(tiff(DEEP, compression=compression), 3).shape == (3, 5, 7)


@pytest.mark.parametrize("order", "<>")
def test_either_order_of_bytes_is_read(order: str) -> None:
    for values, top in ((GREY, 255), (DEEP, 65535)):
        assert np.array_equal(decoded(handmade(values, order)), values / np.float32(top))


def test_where_zero_is_white_the_image_is_inverted() -> None:
    for values, top in ((GREY, 255), (DEEP, 65535)):
        inverted = decoded(handmade(values, photometric=0))
        assert inverted == pytest.approx(1 - values / top, abs=1e-6)
    numbers = RNG.random((5, 7), dtype=np.float32)
    assert decoded(handmade(numbers, photometric=0, format=3)) == pytest.approx(1 - numbers, abs=1e-6)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_floating_point_values_are_read_where_they_are_levels(compression: str | None) -> None:
    values = RNG.random((5, 7), dtype=np.float32)
    values[0, :2] = 0, 1
    assert np.array_equal(decoded(tiff(values, compression=compression)), values)
    for wrong in (-0.01, 1.01, 255, np.nan, np.inf, -np.inf):
        values[1, 1] = wrong
        with pytest.raises(UnsupportedMedia, match=r"outside \[0,1\]"):
            decoded(tiff(values, compression=compression))


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32])
def test_other_integers_are_unsupported(kind: type[np.integer]) -> None:
    data = handmade(np.ones((5, 7), kind), format=2 if np.dtype(kind).kind == "i" else 1)
    with pytest.raises(UnsupportedMedia, match="neither 8 nor 16 bits"):
        decoded(data)


def test_twelve_bits_are_unsupported() -> None:
    with pytest.raises(UnsupportedMedia, match="neither 8 nor 16 bits"):
        decoded(handmade(np.zeros((5, 12), np.uint8), bits=12, width=7))


def test_of_several_pages_the_first_is_read() -> None:
    pages = [Image.fromarray(DEEP), Image.fromarray(GREY), Image.fromarray(DEEP[::-1])]
    assert np.array_equal(decoded(tiff(pages[0], save_all=True, append_images=pages[1:])), DEEP / np.float32(65535))
    with pytest.raises(InvalidInput, match="`frame` is for DICOM"):
        decode_sized(tiff(DEEP), channels=1, size=(5, 7), frame=2)
    assert decode_sized(tiff(DEEP), channels=1, size=(5, 7), frame=1)[1] == (5, 7)


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("values", [GREY, DEEP])
def test_the_orientation_tag_is_obeyed(values: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {0: values, 1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T}
    turned |= {6: np.rot90(values, -1), 7: np.rot90(values, 2).T, 8: np.rot90(values)}
    expected = turned[orientation] / np.iinfo(values.dtype).max
    image, own = decode_sized(tiff(values, exif=exif), channels=1, size=expected.shape)
    assert own == expected.shape
    assert image[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("compression", ["lzma", "zstd"])
def test_unusual_compressions_are_unsupported(compression: str) -> None:
    with pytest.raises(UnsupportedMedia, match="compressed"):
        decoded(tiff(GREY, compression=compression))


def test_tiles_are_read() -> None:
    data = handmade(
        np.arange(256, dtype=np.uint8).reshape(16, 16), extra=((322, 4, 16), (323, 4, 16), (324, 4, 400), (325, 4, 256))
    )
    image, own = decode_sized(data, channels=1, size=(16, 16))
    assert own == (16, 16)
    assert np.array_equal(image[0] * 255, np.arange(256).reshape(16, 16))


def test_a_pixel_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(TooLarge, match="pixels"):
        decoded(handmade(GREY, width=60000, height=60000))
    with pytest.raises(TooLarge, match="pixels"):
        decode_sized(tiff(GREY), channels=1, size=(5, 7), max_pixels=34)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("compression", [*COMPRESSIONS, "jpeg"])
def test_truncated_and_damaged_files_give_an_image_or_a_service_error(compression: str | None) -> None:
    data = tiff(RNG.integers(0, 256, (24, 24)).astype(np.uint8), compression=compression)
    cut = [data[:length] for length in range(0, len(data) - 1, 11)]
    for _ in range(200):
        damaged = bytearray(data)
        damaged[RNG.integers(len(data))] = RNG.integers(256)
        cut.append(bytes(damaged))
    for one in cut:
        try:
            image, _ = decode_sized(one, channels=1, size=(8, 8))
        except ServiceError as error:
            told = error.status
        else:
            told = 200
            assert 0 <= image.min() <= image.max() <= 1
        assert told in (200, 400, 413, 415)
