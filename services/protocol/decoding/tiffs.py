"""TIFF files: what Pillow leaves open about them."""

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from services.protocol.errors import UnsupportedMedia

_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "group3", "group4")


def load_tiff(image: TiffImageFile) -> Image.Image:
    """Decodes the first page of a TIFF.

    Args:
        image: as opened, not loaded yet.

    Returns:
        The image, turned as its orientation tag says. Grey values of 16 bits and of floating-point numbers are in mode
        F, in [0,1]; 0 is black.

    Raises:
        UnsupportedMedia: a compression or a kind of values that is not supported.
        Exception: what Pillow raises on damaged files.
    """
    if image.info.get("compression") not in _COMPRESSIONS:
        raise UnsupportedMedia("the TIFF is compressed in a way that is not supported; use LZW, deflate or none")
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
