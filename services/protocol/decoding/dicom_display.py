"""From the stored values of a DICOM file to what a person would see: the pipeline of DICOM PS3.4, annex N.2."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_windowing, convert_color_space

from services.protocol.decoding.dicom_elements import first_number_of, integers_of, items_of, malformed, value_of
from services.protocol.decoding.dicom_frames import Layout
from services.protocol.errors import InvalidInput, UnsupportedMedia

READ = (
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "RescaleIntercept",
    "RescaleSlope",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *(f"{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
)
"""The elements that this module reads, by their names in the DICOM dictionary."""

COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422")
"""The photometric interpretations of colors that can be shown; of the last, the halved ones doubled already."""

_Stored = npt.NDArray[np.integer[Any]]
_Values = npt.NDArray[np.float64]
_Map = Callable[[npt.NDArray[Any]], _Values]
_Test = Callable[[_Stored], npt.NDArray[np.bool_]]
_TILE = 2**20
_WINDOWS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class _Table:
    """A lookup table: value `first` and all below have the first entry, values beyond the last one the last.

    Attributes:
        first: the value that the first entry is for.
        entries: what values become.
        bits: of an entry.
    """

    first: int
    entries: npt.NDArray[np.integer[Any]]
    bits: int

    def __call__(self, values: npt.NDArray[Any]) -> _Values:
        """Looks values up; those between two integers as the nearest."""
        places = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        looked_up: _Values = self.entries[places.astype(np.intp)].astype(np.float64)
        return looked_up


def to_grey(stored: _Stored, header: Dataset, layout: Layout, index: int) -> npt.NDArray[np.float32]:
    """Grey as displayed: the modality's transformation, then the first table or else the first window for viewing.

    Without either, values of at most 8 bits are shown on the whole range of their bits, as in other image files; for
    deeper ones that says nothing about where the tissue is (a scan of 12 bits in 16 would be black), and the frame's
    own lowest and highest value become black and white. Padding counts for neither, and is black.

    Args:
        stored: (H,W) values, of MONOCHROME1 (the lowest is white) or MONOCHROME2.
        header: the elements named in `READ`, as far as the file has them.
        layout: what the file says of its pixels.
        index: the frame's, from 0; frames may have each their own transformations.

    Returns:
        (H,W) in [0,1].

    Raises:
        InvalidInput: an element is malformed, or numbers lead nowhere.
        UnsupportedMedia: a window of an unknown shape.
    """
    groups = _groups(header, index)
    modality = _modality(_group(groups, "PixelValueTransformationSequence", header), header)
    padded = _padding(header, stored.dtype)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        show = _voi(_group(groups, "FrameVOILUTSequence", header), header)
        if show is None:
            show = _ramp(*_range(stored, modality, padded, layout))
        grey = np.empty(stored.shape, np.float32)
        for rows in _tiles(stored):
            tile = np.clip(show(modality(stored[rows])), 0, 1)
            if layout.photometric == "MONOCHROME1":
                tile = 1 - tile
            tile[padded(stored[rows])] = 0
            grey[rows] = tile
    if not np.isfinite(grey).all():
        raise InvalidInput("the DICOM file's rescale or window has numbers that nothing can be displayed with")
    return grey


def to_rgb(stored: _Stored, layout: Layout, photometric: str) -> npt.NDArray[np.uint8]:
    """Colors (H,W,3) as RGB of 8 bits.

    Args:
        stored: the values.
        layout: what the file says of its pixels.
        photometric: what the values are, one of `COLORS`.
    """
    levels = stored.astype(np.uint8, copy=False) if layout.stored == 8 else _eight_bits(stored, 2**layout.stored - 1)
    if photometric != "RGB":
        for rows in _tiles(levels):
            levels[rows] = convert_color_space(levels[rows], photometric, "RGB")
    return levels


def palette_to_rgb(stored: _Stored, header: Dataset) -> npt.NDArray[np.uint8]:
    """Looks numbers of colors (H,W) up in the file's palette: (H,W,3).

    Raises:
        InvalidInput: the palette is malformed.
        UnsupportedMedia: there is none, or it is in segments.
    """
    rgb = np.empty((*stored.shape, 3), np.uint8)
    for number, color in enumerate(("Red", "Green", "Blue")):
        if f"{color}PaletteColorLookupTableData" not in header:
            raise UnsupportedMedia("the DICOM file has no palette, or one in segments, which is not supported")
        name = f"{color}PaletteColorLookupTable"
        table = _table(header, f"{name}Descriptor", f"{name}Data", header)
        table = _Table(table.first, _eight_bits(table.entries, 2**table.bits - 1), 8)
        for rows in _tiles(stored):
            rgb[rows, :, number] = table(stored[rows])
    return rgb


def _eight_bits(values: _Stored, top: int) -> npt.NDArray[np.uint8]:
    """Values in [0, top] as the nearest of 256 levels."""
    levels = np.empty(values.shape, np.uint8)
    for rows in _tiles(values):
        levels[rows] = np.rint(np.minimum(values[rows], top) * (255 / top))
    return levels


def _tiles(array: npt.NDArray[Any]) -> Iterator[slice]:
    """Groups of rows, so that no step takes a multiple of the image's memory."""
    height = max(1, _TILE * len(array) // array.size)
    return (slice(top, top + height) for top in range(0, len(array), height))


def _groups(header: Dataset, index: int) -> list[Dataset]:
    """The functional groups of a frame, its own before those that all share (DICOM PS3.3, C.7.6.16)."""
    return [
        *items_of(header, "PerFrameFunctionalGroupsSequence")[index : index + 1],
        *items_of(header, "SharedFunctionalGroupsSequence")[:1],
    ]


def _group(groups: list[Dataset], keyword: str, header: Dataset) -> Dataset:
    """The item that holds some of a frame's elements; the header itself where no functional group does."""
    return next((items[0] for group in groups if (items := items_of(group, keyword))), header)


def _modality(group: Dataset, header: Dataset) -> _Map:
    """From stored values to the modality's own (DICOM PS3.3, C.11.1)."""
    tables = items_of(group, "ModalityLUTSequence")
    if tables:
        return _table(tables[0], "LUTDescriptor", "LUTData", header)
    slope = first_number_of(group, "RescaleSlope")
    intercept = first_number_of(group, "RescaleIntercept")
    if slope is None or intercept is None:
        return lambda stored: stored.astype(np.float64)
    if slope == 0:
        raise malformed("RescaleSlope")
    return lambda stored: stored * np.float64(slope) + intercept


def _voi(group: Dataset, header: Dataset) -> _Map | None:
    """From the modality's values to [0,1] (DICOM PS3.3, C.11.2); None where the file does not say how."""
    tables = items_of(group, "VOILUTSequence")
    if tables:
        table = _table(tables[0], "LUTDescriptor", "LUTData", header)
        return lambda values: table(values) / (2**table.bits - 1)
    center, width = first_number_of(group, "WindowCenter"), first_number_of(group, "WindowWidth")
    if center is None or width is None:
        return None
    shape = value_of(group, "VOILUTFunction") or "LINEAR"
    if shape not in _WINDOWS:
        raise UnsupportedMedia(f"the DICOM file's VOILUTFunction is none of {', '.join(_WINDOWS)}")
    if width <= 0 or (shape == "LINEAR" and width < 1):
        raise malformed("WindowWidth")
    # pydicom maps a window to the range of the stored bits: of a single bit, that is [0,1].
    window = Dataset()
    window.PhotometricInterpretation, window.PixelRepresentation, window.BitsStored = "MONOCHROME2", 0, 1
    for keyword in ("WindowCenter", "WindowWidth", "VOILUTFunction"):
        if keyword in group:
            window.add(group[keyword])
    return lambda values: apply_windowing(values, window)


def _ramp(low: float, high: float) -> _Map:
    return lambda values: (values - low) / (high - low) if high > low else np.zeros_like(values)


def _range(stored: _Stored, modality: _Map, padded: _Test, layout: Layout) -> tuple[float, float]:
    """The modality's values that are black and white where the file does not say."""
    if isinstance(modality, _Table):
        if modality.bits <= 8:
            return 0, 2**modality.bits - 1
    elif layout.stored <= 8:
        lowest = -(2 ** (layout.stored - 1)) if layout.signed else 0
        ends = modality(np.array([lowest, lowest + 2**layout.stored - 1]))
        return float(ends.min()), float(ends.max())
    low, high = np.inf, -np.inf
    for rows in _tiles(stored):
        tile = modality(stored[rows])[~padded(stored[rows])]
        low, high = tile.min(initial=low), tile.max(initial=high)
    return float(low), float(high)


def _padding(header: Dataset, kind: np.dtype[Any]) -> _Test:
    """Which stored values stand for no measurement (DICOM PS3.3, C.7.5.1.1.2)."""
    given = [*integers_of(header, "PixelPaddingValue")[:1], *integers_of(header, "PixelPaddingRangeLimit")[:1]]
    if not given:
        return lambda stored: np.zeros(stored.shape, bool)
    ends = np.array(given, np.int64).astype(kind)  # some writers give negative values as unsigned ones
    low, high = int(ends.min()), int(ends.max())
    return lambda stored: (stored >= low) & (stored <= high)


def _table(item: Dataset, descriptor: str, data: str, header: Dataset) -> _Table:
    """Reads a lookup table (DICOM PS3.3, C.11.1.1.1 and C.7.6.3.1.5)."""
    # With implicit value representations, this tells whether the descriptor has signed numbers.
    item.setdefault("PixelRepresentation", header.PixelRepresentation)
    described = integers_of(item, descriptor)
    if len(described) != 3 or not 1 <= described[2] <= 16:
        raise malformed(descriptor)
    count, first, bits = described[0] % 2**16 or 2**16, described[1], described[2]
    value = value_of(item, data)
    if isinstance(value, bytes):
        order = "<" if header.original_encoding[1] else ">"
        words = np.frombuffer(value[: len(value) // 2 * 2], f"{order}u2").astype("<u2")
    else:
        words = np.array(integers_of(item, data)).astype("<u2")
    if bits == 8 and len(words) < count:  # two entries in a word, the lower one first
        words = words.view(np.uint8)
    if len(words) < count:
        raise malformed(data)
    return _Table(first, words[:count], bits)
