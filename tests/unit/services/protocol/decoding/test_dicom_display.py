from typing import Any

import numpy as np
import pytest
from dicom_files import dataset, dicom, lookup_table, written
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from services.protocol.decoding.dicom import read_frame
from services.protocol.errors import InvalidInput, UnsupportedMedia

RAMP = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
LAYOUTS = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


def shown(data: bytes, frame: int | None = None) -> np.ndarray:
    picture = read_frame(data, frame=frame, max_pixels=10**6)
    assert picture.dtype == (np.float32 if picture.ndim == 2 else np.uint8)
    if picture.ndim == 2:
        assert picture.min() >= 0
        assert picture.max() <= 1
    return picture


def linear(values: Any, center: float, width: float) -> np.ndarray:
    """DICOM PS3.3, C.11.2.1.2.1."""
    return np.clip((np.float64(values) - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


@pytest.mark.parametrize("syntax", LAYOUTS)
def test_a_window_is_applied_to_what_rescaling_made(syntax: Any) -> None:
    scale: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": -1024}
    data = dicom(RAMP, syntax, WindowCenter=40, WindowWidth=400, **scale)
    assert shown(data) == pytest.approx(linear(2.0 * RAMP - 1024, 40, 400), abs=1e-6)
    assert 0 < shown(data).mean() < 1


def test_signed_values_are_windowed() -> None:
    values = RAMP.astype(np.int16) - 2000
    data = dicom(values, WindowCenter=-500, WindowWidth=1500)
    assert shown(data) == pytest.approx(linear(values, -500, 1500), abs=1e-6)


def test_a_falling_rescale_turns_the_order_of_values_around() -> None:
    data = dicom(RAMP, WindowCenter=-2000, WindowWidth=5000, RescaleSlope=-1, RescaleIntercept=0)
    assert shown(data) == pytest.approx(linear(-np.float64(RAMP), -2000, 5000), abs=1e-6)
    falling = shown(dicom(RAMP, RescaleSlope=-1, RescaleIntercept=9))
    assert falling == pytest.approx(1 - shown(dicom(RAMP)), abs=1e-6)


def test_of_several_windows_the_first_counts() -> None:
    several = dicom(RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 50])
    assert np.array_equal(shown(several), shown(dicom(RAMP, WindowCenter=1000, WindowWidth=500)))


def test_windows_have_the_shape_that_the_file_names() -> None:
    window: dict[str, Any] = {"WindowCenter": 2000, "WindowWidth": 1000}
    values = np.float64(RAMP)
    assert shown(dicom(RAMP, VOILUTFunction="LINEAR", **window)) == pytest.approx(linear(values, 2000, 1000), abs=1e-6)
    exact = np.clip((values - 2000) / 1000 + 0.5, 0, 1)
    assert shown(dicom(RAMP, VOILUTFunction="LINEAR_EXACT", **window)) == pytest.approx(exact, abs=1e-6)
    sigmoid = 1 / (1 + np.exp(-4 * (values - 2000) / 1000))
    assert shown(dicom(RAMP, VOILUTFunction="SIGMOID", **window)) == pytest.approx(sigmoid, abs=1e-6)
    with pytest.raises(UnsupportedMedia, match="none of LINEAR, LINEAR_EXACT, SIGMOID"):
        shown(dicom(RAMP, VOILUTFunction="CUBIC", **window))


@pytest.mark.parametrize(
    ("shape", "width", "fits"),
    [("LINEAR", 1, True), ("LINEAR", 0.5, False), ("LINEAR_EXACT", 0.5, True), ("SIGMOID", 0.5, True)]
    + [(shape, width, False) for shape in ("LINEAR", "LINEAR_EXACT", "SIGMOID") for width in (0, -1)],
)
def test_windows_have_a_width(shape: str, width: float, fits: bool) -> None:
    data = dicom(RAMP, VOILUTFunction=shape, WindowCenter=2000, WindowWidth=width)
    if fits:
        assert np.array_equal(np.unique(shown(data) > 0.5), [False, True])
    else:
        with pytest.raises(InvalidInput, match="WindowWidth"):
            shown(data)


def test_an_incomplete_window_is_none() -> None:
    for window in ({"WindowCenter": 40}, {"WindowWidth": 40}, {"WindowCenter": None, "WindowWidth": None}):
        assert np.array_equal(shown(dicom(RAMP, **window)), shown(dicom(RAMP)))


def test_without_a_window_shallow_values_have_the_range_of_their_bits() -> None:
    assert shown(dicom(np.uint8([[51, 102]]))).ravel() == pytest.approx([0.2, 0.4])
    assert shown(dicom(np.int8([[-128, 127, 0]]))).ravel() == pytest.approx([0, 1, 128 / 255])
    assert shown(dicom(np.uint16([[3, 15]]), BitsStored=4)).ravel() == pytest.approx([0.2, 1])
    rescaled = dicom(np.uint8([[51, 102]]), RescaleSlope=10, RescaleIntercept=-7)
    assert shown(rescaled).ravel() == pytest.approx([0.2, 0.4])


def test_without_a_window_deep_values_have_the_range_of_the_frame() -> None:
    values = RAMP[:, 1:] // 8 + 100
    expected = (np.float64(values) - values.min()) / (values.max() - values.min())
    assert shown(dicom(values)) == pytest.approx(expected, abs=1e-6)
    assert shown(dicom(values.astype(np.int16) - 300, RescaleSlope=3, RescaleIntercept=1)) == pytest.approx(
        expected, abs=1e-6
    )
    assert shown(dicom(np.full((2, 2), 700, np.uint16))).max() == 0


def test_large_images_are_displayed_tile_by_tile_alike() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (1500, 1700)).astype(np.uint16)
    picture = read_frame(dicom(values), frame=None, max_pixels=10**7)
    assert np.allclose(picture, (np.float64(values) - values.min()) / np.ptp(values), atol=1e-6)


def test_the_lowest_value_of_monochrome1_is_white() -> None:
    for window in ({}, {"WindowCenter": 1000, "WindowWidth": 700}):
        inverted = shown(dicom(RAMP, photometric="MONOCHROME1", **window))
        assert inverted == pytest.approx(1 - shown(dicom(RAMP, **window)), abs=1e-6)
        assert inverted[0, 0] == 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", LAYOUTS)
def test_padding_is_black_and_does_not_stretch_the_range(syntax: Any, photometric: str) -> None:
    values = RAMP.astype(np.int16) + 100
    expected = shown(dicom(values, photometric=photometric))
    padded = values.copy()
    padded[0, :4] = -2000
    picture = shown(dicom(padded, syntax, photometric=photometric, PixelPaddingValue=-2000))
    assert picture[0, :4].max() == 0
    lowest = np.float64(values.ravel()[4])
    again = (values - lowest) / (values.max() - lowest)
    assert picture[1:] == pytest.approx((1 - again if photometric == "MONOCHROME1" else again)[1:], abs=1e-6)
    assert not np.array_equal(expected, picture)


@pytest.mark.parametrize("ends", [(10, 20), (20, 10)])
def test_padding_can_be_a_range(ends: tuple[int, int]) -> None:
    values = np.uint16([[9, 10, 15, 20, 21, 33]])
    picture = shown(dicom(values, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1]))
    assert picture.ravel() == pytest.approx([0, 0, 0, 0, 0.5, 1])


def test_a_frame_of_padding_alone_is_black() -> None:
    assert shown(dicom(np.full((3, 3), 9, np.uint16), PixelPaddingValue=9)).max() == 0


@pytest.mark.parametrize("syntax", LAYOUTS)
def test_the_modalitys_table_comes_before_the_window(syntax: Any) -> None:
    values = np.int16([[-5, -2, -1, 0, 7]])
    made = dataset(values.astype(values.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")))
    table = lookup_table(-2, [100, 300, 500], 16, signed=True)
    if syntax == ExplicitVRBigEndian:
        table.LUTData = np.frombuffer(table.LUTData, "<u2").astype(">u2").tobytes()
    made.ModalityLUTSequence = [table]
    made.WindowCenter, made.WindowWidth = 300.5, 401
    assert shown(written(made, syntax)).ravel() == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("syntax", LAYOUTS)
def test_a_table_for_viewing_comes_after_rescaling(syntax: Any) -> None:
    values = np.uint16([[0, 1, 2, 3]])
    made = dataset(values.astype(values.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")))
    made.RescaleSlope, made.RescaleIntercept = 10, 5
    table = lookup_table(15, list(range(0, 4096, 4095 // 20))[:21], 12)
    if syntax == ExplicitVRBigEndian:
        table.LUTData = np.frombuffer(table.LUTData, "<u2").astype(">u2").tobytes()
    made.VOILUTSequence = [table, lookup_table(0, [0, 0], 8)]
    step = 4095 // 20
    assert shown(written(made, syntax)).ravel() == pytest.approx(np.array([0, 0, 10, 20]) * step / 4095, abs=1e-6)


def test_a_table_for_viewing_counts_more_than_a_window() -> None:
    made = dataset(np.uint16([[0, 1, 2]]), WindowCenter=1, WindowWidth=2)
    made.VOILUTSequence = [lookup_table(0, [51, 102, 204], 8)]
    assert shown(written(made)).ravel() == pytest.approx([0.2, 0.4, 0.8])


def test_a_shallow_table_of_the_modality_has_the_range_of_its_bits() -> None:
    made = dataset(np.uint16([[0, 1, 2]]))
    made.ModalityLUTSequence = [lookup_table(0, [51, 102, 204], 8)]
    assert shown(written(made)).ravel() == pytest.approx([0.2, 0.4, 0.8])
    made.ModalityLUTSequence = [lookup_table(0, [51, 102, 255], 16)]
    assert shown(written(made)).ravel() == pytest.approx([0, 0.25, 1])


def test_entries_of_eight_bits_can_share_words() -> None:
    made = dataset(np.uint16([[0, 1, 2]]))
    table = lookup_table(0, [0, 0, 0], 8)
    table.LUTData = bytes([51, 102, 204, 0])
    made.ModalityLUTSequence = [table]
    assert shown(written(made)).ravel() == pytest.approx([0.2, 0.4, 0.8])


@pytest.mark.parametrize("descriptor", [[3, 0], [3, 0, 17], [3, 0, 0], [4, 0, 16], [0, 0, 16], None])
def test_tables_that_are_not_as_described_are_refused(descriptor: Any) -> None:
    made = dataset(np.uint16([[0, 1, 2]]))
    table = lookup_table(0, [1, 2, 3], 16)
    table.LUTDescriptor = descriptor
    made.VOILUTSequence = [table]
    with pytest.raises(InvalidInput, match="LUT"):
        shown(written(made))


def enhanced(values: np.ndarray, *, shared: Dataset | None, each: list[Dataset] | None) -> Dataset:
    made = dataset(values, frames=True)
    if shared is not None:
        made.SharedFunctionalGroupsSequence = [shared]
    if each is not None:
        made.PerFrameFunctionalGroupsSequence = each
    return made


def group(*, window: tuple[float, float] | None = None, slope: float | None = None) -> Dataset:
    made = Dataset()
    if window is not None:
        made.FrameVOILUTSequence = [Dataset()]
        made.FrameVOILUTSequence[0].WindowCenter, made.FrameVOILUTSequence[0].WindowWidth = window
    if slope is not None:
        made.PixelValueTransformationSequence = [Dataset()]
        made.PixelValueTransformationSequence[0].RescaleSlope = slope
        made.PixelValueTransformationSequence[0].RescaleIntercept = 0
    return made


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("delimited", [True, False])
def test_frames_have_their_own_windows_or_those_that_all_share(syntax: Any, delimited: bool) -> None:
    values = np.stack([RAMP, RAMP[::-1]])
    each = [group(window=(900, 400)), group(window=(2500, 700))]
    made = enhanced(values, shared=group(slope=0.5), each=each)
    made["SharedFunctionalGroupsSequence"].is_undefined_length = delimited
    made["PerFrameFunctionalGroupsSequence"].is_undefined_length = delimited
    data = written(made, syntax)
    assert shown(data, 1) == pytest.approx(linear(values[0] / 2, 900, 400), abs=1e-6)
    assert shown(data, 2) == pytest.approx(linear(values[1] / 2, 2500, 700), abs=1e-6)
    shared = enhanced(values, shared=group(window=(900, 400), slope=1), each=None)
    assert shown(written(shared, syntax), 2) == pytest.approx(linear(values[1], 900, 400), abs=1e-6)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"])
@pytest.mark.parametrize("value", ["1e400", "-1e400", "nan", "inf", "SENTINEL", "1 2", "1e"])
def test_what_is_no_number_is_refused_and_not_quoted(name: str, value: str) -> None:
    window = {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 40, "WindowWidth": 400}
    data = dicom(RAMP, **{**window, name: "11111111"}).replace(b"11111111", value.ljust(8).encode())
    with pytest.raises(InvalidInput, match=f"{name} is missing or malformed") as caught:
        shown(data)
    assert value not in caught.value.message


@pytest.mark.parametrize("scale", [{"RescaleSlope": "1e308"}, {"RescaleSlope": "-1e308"}])
def test_numbers_that_overflow_are_refused(scale: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="displayed"):
        shown(dicom(RAMP, RescaleIntercept=0, **scale))


def test_a_slope_of_zero_is_refused() -> None:
    with pytest.raises(InvalidInput, match="RescaleSlope"):
        shown(dicom(RAMP, RescaleIntercept=0, RescaleSlope=0))


def palette(values: Any, entries: list[list[int]], bits: int = 16, first: int = 0, **elements: Any) -> Dataset:
    made = dataset(np.asarray(values), photometric="PALETTE COLOR", **elements)
    for color, column in zip(("Red", "Green", "Blue"), entries, strict=True):
        setattr(made, f"{color}PaletteColorLookupTableDescriptor", [len(column), first, bits])
        kind = np.uint8 if bits == 8 else np.uint16
        data = np.asarray(column, kind).tobytes()
        setattr(made, f"{color}PaletteColorLookupTableData", data + b"\0" * (len(data) % 2))
    return made


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize(("bits", "top"), [(8, 255), (16, 65535)])
def test_palettes_are_looked_up(syntax: Any, bits: int, top: int) -> None:
    made = palette(np.uint8([[0, 5, 6, 200]]), [[0, top, top], [top, 0, 51 * top // 255], [0, 0, top]], bits, first=4)
    expected = [[[0, 255, 0], [255, 0, 0], [255, 51, 255], [255, 51, 255]]]
    assert shown(written(made, syntax)).tolist() == expected


def test_palettes_that_are_missing_or_in_segments_are_unsupported() -> None:
    made = palette(np.uint8([[0, 1]]), [[0, 1]] * 3)
    del made.GreenPaletteColorLookupTableData
    with pytest.raises(UnsupportedMedia, match="palette"):
        shown(written(made))


def test_colors_of_sixteen_bits_are_reduced_to_eight() -> None:
    values = np.uint16([[[0, 65535, 257 * 100 + 128]]])
    assert shown(dicom(values, photometric="RGB")).tolist() == [[[0, 255, 100]]]
    assert shown(dicom(np.uint16([[[0, 4095, 1024]]]), photometric="RGB", BitsStored=12)).tolist() == [[[0, 255, 64]]]
