"""TIFF files: what Pillow leaves open about them, and what it would let libtiff do."""

import math
from struct import unpack_from

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)

from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia

_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "group3", "group4")
_TILE_ROOM = 2**22


def load_tiff(image: TiffImageFile, data: bytes) -> Image.Image:
    """Decodes the first page of a TIFF.

    Args:
        image: as opened, not loaded yet.
        data: the whole file.

    Returns:
        The image, turned as its orientation tag says. Grey values of 16 bits and of floating-point numbers are in mode
        F, in [0,1]; 0 is black.

    Raises:
        InvalidInput: a tag is ambiguous.
        TooLarge: its tiles take many times the memory of the image.
        UnsupportedMedia: a compression or a kind of values that is not supported.
        Exception: what Pillow raises on damaged files.
    """
    if image.info.get("compression") not in _COMPRESSIONS:
        raise UnsupportedMedia("the TIFF is compressed in a way that is not supported; use LZW, deflate or none")
    _check_tiles(image, data)
    bits, white_is_zero = image.tag_v2.get(BITSPERSAMPLE), image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    image.load()
    if image.mode == "F":
        values = np.asarray(image, np.float32)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnsupportedMedia("the TIFF has floating-point values outside [0,1]: scale them, or use integers")
    elif image.mode.startswith("I;16") and bits == (16,):
        values = np.asarray(image).astype(np.float32) / np.float32(65535)
    elif image.mode.startswith("I"):
        raise UnsupportedMedia("the TIFF has grey values with a sign, or of neither 8 nor 16 bits, nor floating-point")
    else:
        return image
    return Image.fromarray(1 - values if white_is_zero else values)  # Pillow inverts 8 bits alone


def _check_tiles(image: TiffImageFile, data: bytes) -> None:
    """Bounds what libtiff decodes: whole tiles, however little the image fills, and perhaps all from the same bytes.

    libtiff reads the tags itself. Where one is there twice, or has a type that Pillow does not know, the two differ.
    """
    order, start = "<>"[data[:2] == b"MM"], image.tag_v2.offset
    big = data[2:4] in (b"\x2b\0", b"\0\x2b")
    (count,) = unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
    first, step = (start + 8, 20) if big else (start + 2, 12)
    tags = [unpack_from(f"{order}H", data, first + step * number)[0] for number in range(min(count, 2**16))]
    tiled = {TILEWIDTH, TILELENGTH}.intersection(tags)
    if len(set(tags)) < count or not all(tag in image.tag_v2 for tag in tiled):
        raise InvalidInput("the TIFF has a tag twice, or of a wrong type")
    if not tiled:
        return
    sides = [(image.tag_v2[IMAGEWIDTH], image.tag_v2[TILEWIDTH]), (image.tag_v2[IMAGELENGTH], image.tag_v2[TILELENGTH])]
    if math.prod(side + tile for side, tile in sides) > 4 * math.prod(side for side, _ in sides) + _TILE_ROOM:
        raise TooLarge("the TIFF's tiles are many times larger than the image")
