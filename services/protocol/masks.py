"""The one place where the scores of a segmenter become a mask in a file, and the way back.

A mask is a PNG in 8-bit grey that has round(255 * k / (K - 1)) where the class is number k of K: people can see every
class, and a binary segmenter's mask is black and white. Where a mask abstains it has a grey that stands for no class.
"""

import io
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from services.protocol.errors import InvalidInput, Unsupported
from services.protocol.images import opened

MAX_CLASSES = 256
"""As many as 8 bits tell apart."""

_TILE = 1024
_Pixel = TypeVar("_Pixel", bound=np.generic)


def class_map(scores: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The most probable class of every pixel, at another size.

    The scores are resized by bilinear interpolation, antialiased where the size is smaller, and the class is decided
    then: that keeps boundaries smooth. Beside the scores and the result, some 20 MB are in use, however large the
    result is and however many the classes are.

    Args:
        scores: (K,h,w), finite, K at most 256: probabilities, or whatever else grows with them.
        size: (height, width) of the result.

    Returns:
        (height, width) class numbers; of equal scores the first counts.

    Raises:
        Unsupported: more classes than a mask can tell apart.
        ValueError: the scores are not finite: no class is the most probable one.
    """
    _refuse_many(len(scores))
    if not np.isfinite(scores).all():
        raise ValueError("the scores are not finite")
    planes = [Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32)) for plane in scores]
    (height, width), (rows, columns) = size, scores.shape[1:]
    classes = np.zeros(size, np.uint8)
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            tile = classes[top : top + _TILE, left : left + _TILE]
            bottom, right = top + tile.shape[0], left + tile.shape[1]
            # The box bounds what is filled, not what is looked at: tiles meet without a seam.
            box = (left * columns / width, top * rows / height, right * columns / width, bottom * rows / height)
            best = np.full(tile.shape, -np.inf, np.float32)
            for number, plane in enumerate(planes):
                resized = np.asarray(plane.resize(tile.shape[::-1], Image.Resampling.BILINEAR, box=box))
                tile[resized > best] = number
                best = np.maximum(best, resized)
    return classes


def nearest(pixels: npt.NDArray[_Pixel], size: tuple[int, int]) -> npt.NDArray[_Pixel]:
    """An image (h,w) at another size (height, width), every pixel a copy of the one in which its center lies.

    What is certified of the pixels of (h,w) holds for their copies. It would not for a mixture of several: where their
    classes differ, nothing is known of what the mixture answers.
    """
    rows, columns = (
        (2 * np.arange(wanted) + 1) * there // (2 * wanted) for there, wanted in zip(pixels.shape, size, strict=True)
    )
    copies: npt.NDArray[_Pixel] = pixels[rows[:, None], columns]
    return copies


def abstention_level(count: int) -> int:
    """The grey that stands for "no answer": of all greys the one farthest from those of the classes; 128 for two.

    Raises:
        Unsupported: the classes leave no grey.
    """
    distances = abs(np.arange(256)[:, None] - _levels(count).astype(int)).min(axis=1)
    level = 255 - int(distances[::-1].argmax())  # of equally far ones the lightest
    if not distances[level]:
        raise Unsupported(f"a mask that abstains tells 255 classes apart, not {count}: exchange tensors instead")
    return level


def encode_mask(classes: npt.NDArray[np.uint8], count: int, *, abstains: npt.NDArray[np.bool_] | None = None) -> bytes:
    """Class numbers as a mask.

    Args:
        classes: (H,W), each below `count`.
        count: number of classes, 2 to 256.
        abstains: (H,W), where there is no answer whatever `classes` says; None: nowhere.

    Raises:
        Unsupported: it may abstain, and there are too many classes to tell that apart.
    """
    pixels = _levels(count)[classes]
    if abstains is not None:
        pixels[abstains] = abstention_level(count)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_mask(png: bytes, count: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Reads a mask that somebody else made.

    Args:
        png: the whole file; not trusted: that it has the size is checked in its header, before anything is decoded.
        count: number of classes, at least 2.
        size: (height, width) that it has to have.

    Returns:
        (height, width) class numbers.

    Raises:
        InvalidInput: it is damaged, of another size, in colors, or has a value that stands for no class.
        TooLarge: it has more pixels than the size.
        Unsupported: more classes than a mask can tell apart.
        UnsupportedMedia: it is no PNG.
    """
    _refuse_many(count)
    height, width = size
    with opened(png, what="the mask", formats=("PNG",), max_pixels=height * width) as image:
        if image.size != (width, height):
            raise InvalidInput(f"the mask has {image.width} x {image.height} pixels, the image {width} x {height}")
        if image.mode not in ("1", "L"):
            raise InvalidInput(f"the mask must be a PNG in 8-bit grey, not in Pillow's mode {image.mode!r}")
        pixels: npt.NDArray[np.uint8] = np.asarray(image.convert("L"))
    numbers = np.full(256, -1, np.int16)
    numbers[_levels(count)] = np.arange(count)
    classes: npt.NDArray[np.int16] = numbers[pixels]
    if classes.min() < 0:
        raise InvalidInput(
            f"the mask has the value {pixels[classes < 0][0]}, which stands for none of the {count} classes: "
            "class k has the value round(255 * k / (K - 1))"
        )
    return classes.astype(np.uint8)


def _levels(count: int) -> npt.NDArray[np.uint8]:
    """The grey value of each class."""
    return np.rint(255 * np.arange(count) / (count - 1)).astype(np.uint8)


def _refuse_many(count: int) -> None:
    if count > MAX_CLASSES:
        raise Unsupported(f"a mask tells {MAX_CLASSES} classes apart, not {count}: exchange tensors instead")
