import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import compressed, dataset, dicom, encapsulated, item, raw_encapsulated, written
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    RLELossless,
)

from services.protocol.decoding import dicom_frames
from services.protocol.decoding.dicom import read_frame
from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
REAL = Path(pydicom.__file__).parent / "data" / "test_files"  # what pydicom itself is tested with comes with it


def read(data: bytes, frame: int | None = None) -> np.ndarray:
    return read_frame(data, frame=frame, max_pixels=10**6)


def refused(data: bytes, frame: int | None = None) -> ServiceError:
    with pytest.raises((InvalidInput, TooLarge, UnsupportedMedia)) as caught:
        read(data, frame)
    return caught.value


def test_jpeg_frames_are_decoded() -> None:
    y, x = np.mgrid[:40, :64]
    grey = (127 + 100 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint8)
    data = encapsulated([compressed(grey, "JPEG", quality=95)], JPEGBaseline8Bit, grey)
    assert read(data) == pytest.approx(grey / 255, abs=0.02)
    color = np.stack([grey, grey[::-1], 255 - grey], axis=2)
    frame = compressed(color, "JPEG", quality=95, subsampling=0)
    data = encapsulated([frame], JPEGBaseline8Bit, color, photometric="YBR_FULL_422")
    assert read(data) == pytest.approx(color, abs=8)


def test_jpeg_2000_frames_are_decoded() -> None:
    image = RNG.integers(0, 65536, (40, 64)).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG2000", no_jp2=True)
    data = encapsulated([buffer.getvalue()], JPEG2000Lossless, image)
    values = np.float64(image)
    assert read(data) == pytest.approx((values - values.min()) / np.ptp(values), abs=1e-6)


@pytest.mark.parametrize("name", ["bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "RLE"])
def test_a_scan_looks_the_same_however_it_is_encoded(name: str) -> None:
    if name == "jpeg_ls_lossless":
        pytest.importorskip("gdcm", reason="needs a decoder for JPEG-LS")
    scan = read((REAL / "MR_small.dcm").read_bytes())
    assert np.array_equal(read((REAL / f"MR_small_{name}.dcm").read_bytes()), scan)


@pytest.mark.parametrize("name", ["CT_small", "693_J2KI", "examples_overlay", "rtdose_rle_1frame", "MR_small_padded"])
def test_real_scans_look_as_pydicom_shows_them(name: str) -> None:
    """Up to the range of values, which pydicom leaves as it is; padding is left out."""
    path = REAL / f"{name}.dcm"
    made = pydicom.dcmread(path)
    stored = made.pixel_array
    values = np.float64(apply_voi_lut(apply_modality_lut(stored, made), made))
    seen = stored != made.get("PixelPaddingValue")
    shown = read(path.read_bytes())
    slope, start = np.polyfit(values[seen], shown[seen], 1)
    assert slope > 0
    assert shown[seen] == pytest.approx(slope * values[seen] + start, abs=1e-6)
    assert np.ptp(shown[seen]) > 0.5


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_dcmtk",
        "SC_rgb_jpeg_app14_dcmd",
        "SC_rgb_dcmtk_+eb+cy+n2",
        "SC_ybr_full_422_uncompressed",
        "SC_rgb_rle",
    ],
)
def test_real_colors_look_as_pydicom_shows_them(name: str) -> None:
    path = REAL / f"{name}.dcm"
    assert np.array_equal(read(path.read_bytes()), pydicom.dcmread(path).pixel_array)


@pytest.mark.parametrize("syntax", [*NATIVE, RLELossless])
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 5, 7), (3, 5, 7, 3)])
def test_a_frame_of_many_is_chosen_by_its_number_from_one(syntax: UID, shape: tuple[int, ...]) -> None:
    values = RNG.integers(0, 256, shape).astype(np.uint8)
    photometric = "RGB" if shape[3:] else "MONOCHROME2"
    data = dicom(values, syntax, frames=True, photometric=photometric)
    for number in (1, 2, 3):
        expected = values[number - 1] if shape[3:] else values[number - 1] / 255
        assert read(data, number) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("has_bot", [True, False])
def test_compressed_frames_are_found_with_and_without_a_table(has_bot: bool) -> None:
    values = RNG.integers(0, 256, (3, 32, 32)).astype(np.uint8)
    frames = [compressed(one, "JPEG2000", no_jp2=True) for one in values]
    data = encapsulated(frames, JPEG2000Lossless, values, frames=True, has_bot=has_bot)
    for number in (1, 2, 3):
        assert read(data, number) == pytest.approx(values[number - 1] / 255, abs=1e-6)
    made = dataset(values, frames=True)
    made.PixelData = encapsulate(frames, fragments_per_frame=3, has_bot=has_bot)
    made["PixelData"].is_undefined_length = True
    assert read(written(made, JPEG2000Lossless), 2) == pytest.approx(values[1] / 255, abs=1e-6)


def test_compressed_frames_are_found_by_the_extended_table() -> None:
    values = RNG.integers(0, 256, (2, 32, 32)).astype(np.uint8)
    frames = [compressed(one, "JPEG2000", no_jp2=True) for one in values]
    data_items = [one + b"\0" * (len(one) % 2) for one in frames]
    made = dataset(values, frames=True)
    made.PixelData = item(b"") + b"".join(map(item, data_items))
    made["PixelData"].is_undefined_length = True
    made.ExtendedOffsetTable = struct.pack("<2Q", 0, 8 + len(data_items[0]))
    made.ExtendedOffsetTableLengths = struct.pack("<2Q", *map(len, data_items))
    assert read(written(made, JPEG2000Lossless), 2) == pytest.approx(values[1] / 255, abs=1e-6)
    made.ExtendedOffsetTable = struct.pack("<2Q", 0, 2**63)
    assert "offset table" in refused(written(made, JPEG2000Lossless), 2).message


def test_a_syntax_without_a_decoder_is_unsupported_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(encapsulated([b"\0" * 64], MPEG2MPML, GREY))
    assert isinstance(error, UnsupportedMedia)
    assert "MPEG2 Main Profile / Main Level" in error.message

    class Undecodable:
        is_available = False

    monkeypatch.setattr(dicom_frames, "get_decoder", lambda _syntax: Undecodable)
    error = refused(encapsulated([b"\0" * 64], JPEGLossless, GREY))
    assert isinstance(error, UnsupportedMedia)
    assert "JPEG Lossless" in error.message


@pytest.mark.parametrize("syntax", ["1.2.3.4", "SENTINEL", "1.2.840.10008.5.1.4.1.1.7"])
def test_a_syntax_that_is_none_is_unsupported_and_not_quoted(syntax: str) -> None:
    data = dicom(GREY, UID("1.2.840.10008.1.2.1")).replace(
        b"UI\x14\x00" + b"1.2.840.10008.1.2.1\0", b"UI\x14\x00" + syntax.encode()[:20].ljust(20, b"\0")
    )
    error = refused(data)
    assert isinstance(error, UnsupportedMedia)
    assert syntax not in error.message


def test_offset_tables_are_held_against_the_fragments() -> None:
    values = np.zeros((2, 4, 4), np.uint8)
    for table in (struct.pack("<2I", 0, 3), struct.pack("<2I", 0, 2**31)):
        data = raw_encapsulated(item(table) + item(b"ab") + item(b"cd"), RLELossless, values, frames=True)
        assert "offset table" in refused(data, 2).message


JPEG = compressed(RNG.integers(0, 256, (64, 48)).astype(np.uint8), "JPEG")
J2K = compressed(RNG.integers(0, 256, (64, 48)).astype(np.uint8), "JPEG2000", no_jp2=True)
KINDS = [(JPEG, JPEGBaseline8Bit), (J2K, JPEG2000Lossless)]
ZEROS = np.zeros((64, 48), np.uint8)


def patched(frame: bytes, marker: bytes, offset: int, layout: str, *values: int) -> bytes:
    """The frame with other numbers in the first segment of a marker."""
    changed = bytearray(frame)
    struct.pack_into(layout, changed, frame.index(marker) + offset, *values)
    return bytes(changed)


@pytest.mark.parametrize(("frame", "syntax"), KINDS)
def test_frames_of_another_layout_are_refused(frame: bytes, syntax: UID) -> None:
    read(encapsulated([frame], syntax, ZEROS))
    read(encapsulated([frame + b"\0\0"], syntax, ZEROS))
    for other in (ZEROS.T, np.zeros((64, 49), np.uint8), np.zeros((32, 96), np.uint8)):
        assert "another size" in refused(encapsulated([frame], syntax, other)).message
    color = np.zeros((64, 48, 3), np.uint8)
    assert "another size" in refused(encapsulated([frame], syntax, color, photometric="RGB")).message


def test_frames_of_another_depth_are_refused() -> None:
    deep = compressed(RNG.integers(0, 65536, (64, 48)).astype(np.uint16), "JPEG2000", no_jp2=True)
    assert "depth" in refused(encapsulated([deep], JPEG2000Lossless, ZEROS)).message


@pytest.mark.parametrize(("frame", "syntax"), KINDS)
def test_every_truncation_of_a_frame_is_refused(frame: bytes, syntax: UID) -> None:
    for length in range(2, len(frame) - 1, 7):
        refused(encapsulated([frame[:length]], syntax, ZEROS))


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLossless])
def test_frames_of_another_process_are_refused(syntax: UID) -> None:
    other = JPEG if syntax == JPEG2000Lossless else J2K
    refused(encapsulated([other], syntax, ZEROS))
    refused(encapsulated([J2K], JPEGBaseline8Bit, ZEROS))


def test_a_jpeg_without_a_size_is_refused() -> None:
    start = JPEG.index(b"\xff\xc0")
    end = start + 2 + int.from_bytes(JPEG[start + 2 : start + 4], "big")
    refused(encapsulated([JPEG[:start] + JPEG[end:]], JPEGBaseline8Bit, ZEROS))


def test_components_of_several_sizes_or_depths_are_refused() -> None:
    assert (
        "components"
        in refused(encapsulated([patched(J2K, b"\xff\x51", 41, ">2B", 2, 2)], JPEG2000Lossless, ZEROS)).message
    )
    color = RNG.integers(0, 256, (64, 48, 3)).astype(np.uint8)
    frame = patched(compressed(color, "JPEG2000", no_jp2=True), b"\xff\x51", 43, ">B", 11)
    data = encapsulated([frame], JPEG2000Lossless, color.astype(np.uint16), photometric="RGB")
    assert "components" in refused(data).message


@pytest.mark.parametrize("segments", [[b"\xfd\x07"], [b"\xfd\x07" * 768] * 2, []])
def test_runs_that_expand_to_something_else_are_refused(segments: list[bytes]) -> None:
    starts = np.cumsum([64, *map(len, segments)])[:-1]
    frame = struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)
    refused(encapsulated([frame], RLELossless, ZEROS))
