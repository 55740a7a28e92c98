"""The one place where the bytes of an image become numbers, and the way back.

Formats are told by content and allow-listed: PNG and JPEG. Of an animated PNG the default image is read, of a
multi-picture JPEG the first. Transparent pixels are laid over black.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from services.protocol.errors import InvalidInput, TooLarge, UnsupportedMedia

MAX_PIXELS = 40_000_000
"""Default bound on width times height: decoded as RGB, 120 MB."""

_FORMATS = ("PNG", "JPEG")
_ALPHA_MODES = ("LA", "PA", "La", "RGBA", "RGBa")

# Pillow only warns about the lesser bombs. Set for the whole process, because `catch_warnings` is not thread-safe.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def decode_image(
    data: bytes, *, channels: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.float32]:
    """Decodes a PNG or JPEG to the shape that a model takes.

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
        InvalidInput: the data is empty or damaged.
        TooLarge: more pixels than allowed.
        UnsupportedMedia: neither PNG nor JPEG.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if not data:
        raise InvalidInput("the image is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(f"the image has {image.width} x {image.height} pixels; at most {max_pixels} are allowed")
            return _to_array(image, channels, size)
    except TooLarge:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise TooLarge(f"the image has more than the {max_pixels} pixels allowed") from error
    except UnidentifiedImageError as error:
        raise UnsupportedMedia("the image is neither PNG nor JPEG, or its header is damaged") from error
    except Exception as error:  # on damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, and more
        raise InvalidInput(f"the image cannot be decoded: {error}") from error


def _to_array(image: Image.Image, channels: int, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Decodes, orients, converts and resizes an opened image."""
    # JPEG decodes at 1/2, 1/4 or 1/8 of its size at a fraction of the cost. Twice the wanted size is kept for the
    # antialiasing; the box is square, because the orientation tag may swap the sides.
    box = 2 * max(size)
    image.draft("L" if channels == 1 else None, (box, box))
    ImageOps.exif_transpose(image, in_place=True)
    height, width = size
    if image.mode.startswith("I"):  # 16-bit grey
        deep = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
        grey = np.asarray(_resized(deep, width, height), dtype=np.float32)
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
