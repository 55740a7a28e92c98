"""The one place where the bytes of an image become numbers, and the way back.

Formats are told by content and allow-listed: PNG, JPEG, TIFF, and DICOM, which has a module of its own. Of an animated
PNG the default image is read, of a multi-picture JPEG the first, of a TIFF the first page. Transparent pixels are laid
over black. Grey keeps 16 bits; colors of 16 bits are reduced to 8, as Pillow knows no deeper ones.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from services.protocol.decoding.tiffs import load_tiff
from services.protocol.errors import InvalidInput, ServiceError, TooLarge, UnsupportedMedia

MAX_PIXELS = 40_000_000
"""Default bound on width times height: decoded as RGB, 120 MB."""

_FORMATS = ("PNG", "JPEG", "TIFF")
_DICOM_PLACE = slice(128, 132)
_PLAIN_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_PLAIN_BYTES = 2**20
_PLAIN_PIXELS = 2**18
_PLAIN_SCANS = 4  # of a JPEG; each may take as long as a whole image, and as little as 12 bytes
_ALPHA_MODES = ("LA", "PA", "La", "RGBA", "RGBa")
_ON_ITS_SIDE = (5, 6, 7, 8)  # the orientations that swap height and width

# Pillow only warns about the lesser bombs. Set for the whole process, because `catch_warnings` is not thread-safe.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Its debug log has the tags of TIFF and EXIF, which can tell of patients.
logging.getLogger("PIL").setLevel(logging.INFO)


def decode_image(
    data: bytes, *, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.float32]:
    """Decodes an image file to the shape that a model takes.

    The orientation tag is obeyed, 16-bit grey keeps its depth, and another size is reached by antialiased bilinear
    interpolation without regard to the aspect ratio. The same bytes always give the same numbers.

    Args:
        data: the whole file.
        channels: 1 for grey (ITU-R 601 luma of colored images), 3 for RGB.
        size: (height, width) of the result.
        max_pixels: largest width times height accepted; checked in the header, before anything is decoded.

    Returns:
        (channels, height, width), float32 in [0,1].

    Raises:
        InvalidInput: the data is empty or damaged, or has several frames.
        TooLarge: more pixels than allowed.
        UnsupportedMedia: none of the formats, or a variant that cannot be read here; the message says why.
    """
    return decode_sized(data, channels=channels, size=size, max_pixels=max_pixels)[0]


def decode_sized(
    data: bytes, *, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS, frame: int | None = None
) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """`decode_image`, and the (height, width) that the image has itself, its orientation tag obeyed.

    Args:
        data: as there.
        channels: as there.
        size: as there.
        max_pixels: as there.
        frame: number of the frame of a DICOM file, from 1; None: its only one. Other files have one frame.

    Raises:
        ServiceError: as there; `InvalidInput` also if there is no such frame.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if data[_DICOM_PLACE] == b"DICM":
        picture = _dicom_frame(data, frame, max_pixels)
        return _scaled(picture, channels, size), (picture.height, picture.width)
    if frame not in (None, 1):
        raise InvalidInput("`frame` is for DICOM files; this image has one frame")
    with opened(data, max_pixels=max_pixels) as image:
        if isinstance(image, TiffImageFile):
            page = load_tiff(image)
            return _scaled(page, channels, size), (page.height, page.width)
        return _to_array(image, channels, size)


def looks_plain(data: bytes, frame: int | None) -> bool:
    """Whether `decode_plain` is worth a try."""
    return (
        len(data) <= _PLAIN_BYTES
        and data.startswith(_PLAIN_STARTS)
        and data[_DICOM_PLACE] != b"DICM"
        and data.count(b"\xff\xda") <= _PLAIN_SCANS
        and frame in (None, 1)
    )


def decode_plain(
    data: bytes, *, channels: int, size: tuple[int, int]
) -> tuple[npt.NDArray[np.float32], tuple[int, int]] | None:
    """`decode_sized` of a small PNG or sequential JPEG, in some milliseconds; None for other files.

    Args:
        data: what `looks_plain`.
        channels: as there.
        size: as there.
    """
    with opened(data) as image:
        if image.width * image.height > _PLAIN_PIXELS or image.format == "MPO" or "progressive" in image.info:
            return None
        return _to_array(image, channels, size)


def _dicom_frame(data: bytes, frame: int | None, max_pixels: int) -> Image.Image:
    try:
        from services.protocol.decoding.dicom import read_frame  # pydicom is an extra, and takes a while to import
    except ModuleNotFoundError as error:
        raise UnsupportedMedia("this service was installed without DICOM support, the extra `dicom`") from error
    return Image.fromarray(read_frame(data, frame=frame, max_pixels=max_pixels))


@contextmanager
def opened(
    data: bytes, *, what: str = "the image", formats: tuple[str, ...] = _FORMATS, max_pixels: int = MAX_PIXELS
) -> Iterator[Image.Image]:
    """Opens an image file; whatever fails inside the context is a fault of the file.

    Args:
        data: the whole file.
        what: names it in messages.
        formats: Pillow's names of the formats allowed.
        max_pixels: largest width times height accepted; checked in the header, before anything is decoded.

    Raises:
        InvalidInput: the data is empty or damaged.
        TooLarge: more pixels than allowed.
        UnsupportedMedia: none of the formats.
    """
    if not data:
        raise InvalidInput(f"{what} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(f"{what} has {image.width} x {image.height} pixels; at most {max_pixels} are allowed")
            yield image
    except (ServiceError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLarge(f"{what} has more than the {max_pixels} pixels allowed") from error
    except UnidentifiedImageError as error:
        names = (*formats, "DICOM") if formats == _FORMATS else formats
        none = f"neither {' nor '.join(names)}" if len(names) > 1 else f"no {names[0]}"
        raise UnsupportedMedia(f"{what} is {none}, or its header is damaged") from error
    except Exception as error:  # on damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, and more
        # Not in their words: they may quote what the file says of a patient.
        raise InvalidInput(f"{what} cannot be decoded: it is damaged or cut short") from error


def _to_array(
    image: Image.Image, channels: int, size: tuple[int, int]
) -> tuple[npt.NDArray[np.float32], tuple[int, int]]:
    """Decodes, orients, converts and resizes an opened image; with its own (height, width) once oriented."""
    own = (image.height, image.width)
    # JPEG decodes at 1/2, 1/4 or 1/8 of its size at a fraction of the cost. Twice the wanted size is kept for the
    # antialiasing; the box is square, because the orientation tag may swap the sides.
    box = 2 * max(size)
    image.draft("L" if channels == 1 else None, (box, box))
    image.load()  # a PNG's orientation may stand behind its pixels
    if image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE:
        own = own[::-1]
    ImageOps.exif_transpose(image, in_place=True)
    return _scaled(image, channels, size), own


def _scaled(image: Image.Image, channels: int, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    height, width = size
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    if image.mode == "F":
        grey = np.asarray(_resized(image, width, height), dtype=np.float32)
        return np.repeat(grey[None], channels, axis=0)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "black"), seen)
    pixels = np.asarray(_resized(image.convert("L" if channels == 1 else "RGB"), width, height))
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes, dtype=np.float32) / np.float32(255)


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def encode_png(image: npt.NDArray[np.floating]) -> bytes:
    """Encodes an image as an 8-bit PNG; values are clipped to [0,1] and rounded to the nearest of 256 levels.

    Args:
        image: (C, H, W) with C 1 (grey) or 3 (RGB).
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image of shape (1 or 3, height, width), got {image.shape}")
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(levels[0] if levels.shape[0] == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)  # speed: noise hardly compresses anyway
    return buffer.getvalue()
