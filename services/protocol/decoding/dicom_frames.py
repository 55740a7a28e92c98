"""One frame of a DICOM file's pixel data, as stored values."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydicom.encaps import encapsulate, get_frame, parse_basic_offsets, parse_fragments
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from services.protocol.decoding.dicom_codestreams import SYNTAXES, check_frame
from services.protocol.decoding.dicom_elements import Stream
from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia

MAX_FRAMES: Final = 100_000
"""Most frames of a file: the table of their offsets is read whole, whichever frame is wanted."""


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

    stream: Stream
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
        usable = get_decoder(syntax).is_available and (syntax in SYNTAXES or not syntax.is_encapsulated)
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
        TooLarge: decoding it could take too much memory or too long.
        Exception: what else pydicom and its decoders raise on damaged data.
    """
    source: bytes | memoryview
    if pixels.syntax.is_encapsulated:
        frame = _compressed(pixels, layout, index)
        check_frame(frame, pixels.syntax, (layout.rows, layout.columns, layout.samples, layout.allocated))
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
    stream.seek(pixels.start + 4)
    if int.from_bytes(stream.read(4), "little") > 4 * MAX_FRAMES:
        raise TooLarge(f"the DICOM file has an offset table for more than {MAX_FRAMES} frames")
    stream.seek(pixels.start)
    offsets = parse_basic_offsets(stream)
    first = stream.tell()
    fragments = set(parse_fragments(stream)[1])
    extended = np.frombuffer(pixels.offsets[0], "<u8").tolist()
    # pydicom goes wherever an offset points, and reads what is there, unbounded.
    if not fragments.issuperset(first + offset for offset in (*offsets, *extended)):
        raise InvalidInput("the DICOM file's offset table does not fit its fragments")
    stream.seek(pixels.start)
    frame = get_frame(
        stream, index, number_of_frames=layout.frames, extended_offsets=pixels.offsets if extended else None
    )
    stream.check()
    return frame
