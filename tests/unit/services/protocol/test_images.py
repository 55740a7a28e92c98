import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from dicom_files import dicom
from PIL import Image

from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia
from services.protocol.images import decode_image, decode_sized, encode_png


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def grey(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def png(width: int, height: int, *, depth: int = 8, color: int = 0, rows: bytes) -> bytes:
    """A PNG of these unfiltered rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that announces a size and brings hardly any data."""
    return png(width, height, rows=b"\0" * 64)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_encode_png_wrote_comes_back_exactly(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 9, 7))
    image = levels.astype(np.float32) / np.float32(255)
    decoded = decode_image(encode_png(image), channels=channels, size=(9, 7))
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, image)


def test_encode_png_clips_and_rounds_to_the_nearest_level() -> None:
    image = np.array([[[-1.0, 2.0, 0.4 / 255, 0.6 / 255]]], dtype=np.float32)
    levels = decode_image(encode_png(image), channels=1, size=(1, 4)) * 255
    assert levels.ravel().tolist() == [0, 255, 0, 1]


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (1, 1, 4, 4)])
def test_encode_png_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        encode_png(np.zeros(shape, dtype=np.float32))


def test_grey_becomes_three_equal_channels_and_color_becomes_luma() -> None:
    one = decode_image(saved(grey([[0, 51], [102, 255]])), channels=3, size=(2, 2))
    assert np.array_equal(one[0], one[1])
    assert np.array_equal(one[0], one[2])
    red = decode_image(saved(Image.new("RGB", (2, 2), (255, 0, 0))), channels=1, size=(2, 2))
    assert red.ravel().tolist() == pytest.approx([0.299] * 4, abs=1 / 255)


def test_sixteen_bit_grey_keeps_its_depth() -> None:
    values = np.array([[0, 1], [32768, 65535]], dtype=np.uint16)
    decoded = decode_image(saved(Image.fromarray(values)), channels=1, size=(2, 2))
    assert decoded.ravel().tolist() == pytest.approx([0, 1 / 65535, 32768 / 65535, 1], abs=1e-7)
    assert decode_image(saved(Image.fromarray(values)), channels=3, size=(4, 4)).shape == (3, 4, 4)


def test_sixteen_bit_colors_are_reduced_to_eight() -> None:
    """Pillow knows no deeper ones; the error is below 1/255."""
    levels = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    decoded = decode_image(png(5, 4, depth=16, color=2, rows=rows), channels=3, size=(4, 5))
    assert np.abs(decoded - levels.transpose(2, 0, 1) / 65535).max() < 1 / 255


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"])
def test_palettes_are_looked_up_and_transparent_entries_are_black(transparency: int | bytes | None) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    decoded = decode_image(saved(image, **options), channels=3, size=(1, 2))
    assert decoded[:, 0, 0].tolist() == [1, 0, 0]
    assert decoded[:, 0, 1].tolist() == ([0, 1, 0] if transparency is None else [0, 0, 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_over_black(mode: str) -> None:
    color = (200, 200, 200, 0) if mode == "RGBA" else (200, 0)
    image = Image.new(mode, (2, 1), color)
    image.putpixel((1, 0), (*color[:-1], 255))
    decoded = decode_image(saved(image), channels=1, size=(1, 2))
    assert decoded.ravel().tolist() == pytest.approx([0, 200 / 255])


def test_bilevel_and_cmyk_images_are_read() -> None:
    assert decode_image(saved(Image.new("1", (3, 3), 1)), channels=1, size=(3, 3)).min() == 1
    white = decode_image(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), channels=3, size=(8, 8))
    assert white.min() > 0.95


def test_the_orientation_tag_is_obeyed() -> None:
    picture = Image.new("L", (64, 32), 0)
    picture.paste(255, (0, 0, 32, 32))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the left half is above
    for kind in ("JPEG", "PNG"):
        decoded = decode_image(saved(picture, kind, exif=exif), channels=1, size=(64, 32))
        assert decoded[0, :28].min() > 0.9
        assert decoded[0, 36:].max() < 0.1


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_knows_its_own_size_as_it_is_shown(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.new("RGB", (1200, 803)), kind, exif=exif)
    decoded, own = decode_sized(data, channels=1, size=(16, 24))  # so small that a JPEG is decoded at 1/8
    assert decoded.shape == (1, 16, 24)
    assert own == ((1200, 803) if orientation >= 5 else (803, 1200))
    assert decode_sized(saved(Image.new("L", (7, 5)), kind), channels=3, size=(16, 24))[1] == (5, 7)


def test_an_orientation_behind_the_pixels_is_obeyed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("L", (6, 2)), exif=exif)
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    last = data.index(b"IEND") - 4
    behind = data[:begin] + data[end:last] + data[begin:end] + data[last:]
    assert decode_sized(behind, channels=1, size=(4, 4))[1] == (6, 2)


@pytest.mark.parametrize("size", [(1, 500), (500, 1)])
def test_images_of_one_line_are_read(size: tuple[int, int]) -> None:
    decoded = decode_image(saved(Image.new("L", size, 102)), channels=1, size=(8, 8))
    assert decoded == pytest.approx(0.4)


def test_of_an_animation_the_default_image_is_read() -> None:
    first, second = grey([[10, 10]]), grey([[200, 200]])
    decoded = decode_image(saved(first, save_all=True, append_images=[second]), channels=1, size=(1, 2))
    assert decoded.ravel().tolist() == pytest.approx([10 / 255] * 2)


def test_shrinking_is_antialiased_and_repeatable() -> None:
    stripes = grey(np.tile([0, 255], (512, 256)))
    for kind in ("PNG", "JPEG"):
        data = saved(stripes, kind)
        first = decode_image(data, channels=1, size=(32, 32))
        assert first == pytest.approx(0.5, abs=0.02)
        assert np.array_equal(first, decode_image(data, channels=1, size=(32, 32)))


def test_the_fast_jpeg_path_agrees_with_a_full_decode() -> None:
    y, x = np.mgrid[0:512, 0:512] / 512
    data = saved(grey(127 + 120 * np.sin(6 * x) * np.cos(5 * y)), "JPEG", quality=95)
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.BILINEAR)
    assert decode_image(data, channels=1, size=(64, 64))[0] == pytest.approx(np.asarray(full) / 255, abs=2 / 255)


def test_a_pixel_bomb_is_refused_by_its_header() -> None:
    for width, height in ((8000, 8000), (12000, 12000), (60000, 60000)):
        with pytest.raises(TooLarge, match="pixels"):
            decode_image(png_header_only(width, height), channels=1, size=(64, 64))
    with pytest.raises(TooLarge, match="3 x 3"):
        decode_image(saved(Image.new("L", (3, 3))), channels=1, size=(3, 3), max_pixels=8)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "WEBP", "JPEG2000"])
def test_other_formats_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedMedia, match="neither PNG nor JPEG nor TIFF nor DICOM"):
        decode_image(saved(Image.new("L", (4, 4)), kind), channels=1, size=(4, 4))


def test_bytes_that_are_no_image_are_unsupported() -> None:
    with pytest.raises(UnsupportedMedia):
        decode_image(b"\x00" * 100, channels=1, size=(4, 4))


def test_no_bytes_are_invalid() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        decode_image(b"", channels=1, size=(4, 4))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncation_is_refused_with_a_service_error(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24))
    data = saved(grey(noise), kind)
    for length in range(1, len(data) * 3 // 4, 7):
        with pytest.raises((InvalidInput, UnsupportedMedia)):
            decode_image(data[:length], channels=1, size=(4, 4))


def test_damaged_bytes_give_an_image_or_a_service_error() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG"):
        data = saved(grey(rng.integers(0, 256, (16, 16))), kind)
        for _ in range(200):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] = rng.integers(256)
            try:
                decoded = decode_image(bytes(damaged), channels=1, size=(8, 8))
            except (InvalidInput, TooLarge, UnsupportedMedia):
                continue
            assert decoded.shape == (1, 8, 8)
            assert 0 <= decoded.min() <= decoded.max() <= 1


def test_dicom_is_known_by_its_content_and_comes_with_its_own_size() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (12, 20)).astype(np.uint8)
    decoded, own = decode_sized(dicom(levels), channels=1, size=(12, 20))
    assert own == (12, 20)
    assert np.array_equal(decoded[0], levels / np.float32(255))
    for channels in (1, 3):
        decoded, own = decode_sized(dicom(levels), channels=channels, size=(6, 10))
        assert own == (12, 20)
        expected = decode_image(saved(grey(levels)), channels=channels, size=(6, 10))
        assert decoded == pytest.approx(expected, abs=1 / 255)


def test_colors_of_dicom_become_what_the_model_takes() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    as_png = saved(Image.fromarray(levels))
    for channels in (1, 3):
        decoded = decode_image(dicom(levels, photometric="RGB"), channels=channels, size=(5, 4))
        assert np.array_equal(decoded, decode_image(as_png, channels=channels, size=(5, 4)))


def test_frames_are_for_dicom() -> None:
    data = dicom(np.arange(3, dtype=np.uint8).repeat(4).reshape(3, 2, 2), frames=True)
    assert decode_sized(data, channels=1, size=(2, 2), frame=3)[0].max() == pytest.approx(2 / 255)
    with pytest.raises(InvalidInput, match="3 frames"):
        decode_image(data, channels=1, size=(2, 2))
    for kind in ("PNG", "JPEG"):
        one = saved(Image.new("L", (4, 4)), kind)
        assert decode_sized(one, channels=1, size=(2, 2), frame=1)[1] == (4, 4)
        with pytest.raises(InvalidInput, match="one frame"):
            decode_sized(one, channels=1, size=(2, 2), frame=2)


def test_without_pydicom_there_is_no_dicom_and_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom([[1, 2]])
    for name in [name for name in sys.modules if name.startswith(("pydicom", "services.protocol.decoding.dicom"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnsupportedMedia, match="installed without DICOM support"):
        decode_image(data, channels=1, size=(2, 2))
    assert decode_image(saved(grey([[255]])), channels=1, size=(1, 1)) == 1


def test_a_dicom_without_its_magic_is_unsupported() -> None:
    with pytest.raises(UnsupportedMedia, match="DICOM"):
        decode_image(dicom([[1, 2]])[132:], channels=1, size=(2, 2))


def test_only_grey_and_color_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="channels"):
        decode_image(b"", channels=2, size=(4, 4))
