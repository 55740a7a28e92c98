"""The one place where a DICOM file becomes pixels. Nothing else of the file leaves it.

Needs pydicom (the extra `dicom`), which `images` finds out by importing this module when the first such file comes.
Only the elements that describe pixels are ever read. pydicom quotes values in its errors, warnings and log: errors are
told here in words of our own, and the other two are switched off, for the whole process.
"""

import io
import logging
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from services.protocol.decoding.dicom_display import COLORS, READ, palette_to_rgb, to_grey, to_rgb
from services.protocol.decoding.dicom_elements import element_tag, integer_of, integers_of, malformed, value_of
from services.protocol.decoding.dicom_frames import Layout, PixelData, refuse_undecodable, stored_values
from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia

_LAYOUT = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)
_PIXEL_DATA = (0x7FE00010, 0x7FE00008, 0x7FE00009)  # integers, floats, doubles
_UNDEFINED = 0xFFFFFFFF
_DATA_SET = 128 + len(b"DICM")
_BYTES_PER_PIXEL = 4  # most in memory, on average, and most in a file that is deflated as a whole
_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1} | dict.fromkeys(
    ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"), 3
)

for _library in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg", "rle"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)
# For the whole process, because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module="pydicom")


def read_frame(data: bytes, *, frame: int | None, max_pixels: int) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
    """Decodes a frame as it would be displayed; see `dicom_display.to_grey` for what that means.

    Args:
        data: the whole file.
        frame: number of the frame, from 1. None: the only one.
        max_pixels: largest width times height accepted; checked before anything is decoded.

    Returns:
        Grey (H,W) float32 in [0,1], or colors (H,W,3) uint8.

    Raises:
        InvalidInput: the file is damaged, has no pixels, or no such frame; or it has several and none was chosen.
        TooLarge: more pixels than allowed, or more bytes.
        UnsupportedMedia: a transfer syntax for which no decoder is installed, or a kind of pixels that is not known.
    """
    try:
        pixels, header = _opened(data, _BYTES_PER_PIXEL * max_pixels)
        layout = _layout(header, max_pixels)
        index = _index(frame, layout.frames)
        stored, photometric = stored_values(pixels, layout, index)
        if photometric == "PALETTE COLOR":
            return palette_to_rgb(stored, header)
        if photometric in COLORS:
            return to_rgb(stored, layout, photometric)
        if layout.samples == 3:
            raise UnsupportedMedia("the DICOM file's colors are of a kind that only other transfer syntaxes have")
        return to_grey(stored, header, layout, index)
    except (ServiceError, MemoryError):
        raise
    except Exception:  # on damaged files pydicom raises whatever it meets; its words may quote the file
        raise InvalidInput("the DICOM file is damaged or cut short") from None


def _opened(data: bytes, max_bytes: int) -> tuple[PixelData, Dataset]:
    """Reads what describes the pixels, up to them; they stay where they are."""
    stream = io.BytesIO(data)
    stream.seek(_DATA_SET)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag >> 16 != 2)
    syntax = value_of(meta, "TransferSyntaxUID")
    if not isinstance(syntax, UID):
        raise malformed("TransferSyntaxUID")
    refuse_undecodable(syntax)
    if syntax == DeflatedExplicitVRLittleEndian:
        stream = io.BytesIO(_inflated(data[stream.tell() :], max_bytes))
    reached: list[tuple[int, str | None, int, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXEL_DATA:
            reached.append((tag, vr, length, stream.tell()))
        return bool(reached)

    header = read_dataset(
        stream,
        syntax.is_implicit_VR,
        syntax.is_little_endian,
        stop_when=at_pixels,
        specific_tags=[element_tag(keyword) for keyword in (*_LAYOUT, *READ)],
    )
    if not reached:
        raise InvalidInput("the DICOM file has no pixels, or is cut short before them")
    tag, vr, length, start = reached[0]
    if tag != _PIXEL_DATA[0]:
        raise UnsupportedMedia("the DICOM file has floating-point pixels, which are not supported")
    offsets, lengths = (
        value_of(header, keyword) or b"" for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
    )
    if not isinstance(offsets, bytes) or not isinstance(lengths, bytes):
        raise malformed("ExtendedOffsetTable")
    return PixelData(stream, syntax, start, None if length == _UNDEFINED else length, vr, (offsets, lengths)), header


def _inflated(data: bytes, max_bytes: int) -> bytes:
    """The data set of a file that is deflated as a whole (DICOM PS3.5, A.5)."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(data, max_bytes + 1)
    if len(plain) > max_bytes:
        raise TooLarge(f"the DICOM file inflates to more than the {max_bytes} bytes allowed")
    if not inflater.eof:
        raise InvalidInput("the DICOM file's deflated data is cut short")
    return plain


def _layout(header: Dataset, max_pixels: int) -> Layout:
    """What the file says of its pixels, refused where it is impossible, too much, or not known here."""
    photometric = value_of(header, "PhotometricInterpretation")
    if photometric not in _SAMPLES or not isinstance(photometric, str):
        raise UnsupportedMedia(f"the DICOM file's PhotometricInterpretation is none of {', '.join(_SAMPLES)}")
    layout = Layout(
        rows=integer_of(header, "Rows"),
        columns=integer_of(header, "Columns"),
        frames=next(iter(integers_of(header, "NumberOfFrames")), 1),
        samples=integer_of(header, "SamplesPerPixel"),
        allocated=integer_of(header, "BitsAllocated"),
        stored=integer_of(header, "BitsStored"),
        signed=integer_of(header, "PixelRepresentation") == 1,
        planar=next(iter(integers_of(header, "PlanarConfiguration")), 0),
        photometric=photometric,
    )
    if layout.rows < 1 or layout.columns < 1:
        raise InvalidInput("the DICOM file has no rows or no columns")
    if layout.samples != _SAMPLES[photometric]:
        raise malformed("SamplesPerPixel")
    if layout.allocated not in (1, 8, 16, 32):
        raise UnsupportedMedia("the DICOM file's BitsAllocated is none of 1, 8, 16 and 32")
    if not 1 <= layout.stored <= layout.allocated:
        raise malformed("BitsStored")
    if integers_of(header, "HighBit") not in ([], [layout.stored - 1]):
        raise UnsupportedMedia("the DICOM file's samples are not in their lowest bits: HighBit is not BitsStored - 1")
    if layout.samples == 3 and (layout.signed or (photometric != "RGB" and layout.allocated != 8)):
        raise UnsupportedMedia("the DICOM file's colors are signed, or YBR of more than 8 bits")
    size = layout.rows * layout.columns
    if size > max_pixels or size * layout.samples * layout.allocated > 8 * _BYTES_PER_PIXEL * max_pixels:
        raise TooLarge(
            f"the DICOM file's frames have more than {max_pixels} pixels, or {_BYTES_PER_PIXEL} times the bytes"
        )
    if layout.frames < 1:
        raise malformed("NumberOfFrames")
    return layout


def _index(frame: int | None, count: int) -> int:
    """The chosen frame's index, from 0. There is no default among several: they may be a whole body."""
    if frame is None and count > 1:
        raise InvalidInput(f"the DICOM file has {count} frames; choose one with `frame`, from 1 to {count}")
    if frame is not None and not 1 <= frame <= count:
        raise InvalidInput(f"`frame` is not one of the DICOM file's frames: from 1 to {count}")
    return 0 if frame is None else frame - 1
