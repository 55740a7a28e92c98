"""Single elements of a DICOM data set: bounded, checked, and complained of in words that quote nothing of the file.

pydicom converts a value when it is first asked for, whatever its size, and its errors quote what could not be
converted. Here the size is checked first, and every failure is an `InvalidInput` that names the element alone.
"""

import io
import math
from typing import Final

from pydicom.charset import default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from services.protocol.errors import InvalidInput, TooLarge

MAX_VALUE: Final = 2**18
"""Most bytes of a value; a lookup table of 65536 entries takes half."""

_MAX_WORK = 2**20  # some seconds
_ITEM = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the tag, in either order of bytes
_ITEM_WORK = 12


class Stream(io.BytesIO):
    """Bytes in memory that pydicom can walk over for a bounded time.

    It does so element by element, and 256 MB hold 32 million empty ones. A sequence's item takes it 12 times as long.
    """

    def __init__(self, data: bytes) -> None:
        """Shares the bytes."""
        super().__init__(data)
        self._work = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as any file does.

        Raises:
            TooLarge: it was read too often.
        """
        self.check()
        data = super().read(size)
        self._work += _ITEM_WORK if size == 8 and data[:4] in _ITEM else 1
        return data

    def check(self) -> None:
        """Raises what `read` does: in some places pydicom takes any error for the end of the file."""
        if self._work > _MAX_WORK:
            raise TooLarge("the DICOM file has too many elements, items or fragments")


def element_tag(keyword: str) -> int:
    """The tag of a keyword of the DICOM dictionary."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"{keyword!r} is no keyword of the DICOM dictionary")
    return tag


def malformed(keyword: str) -> InvalidInput:
    """The error that an element is not what it has to be."""
    return InvalidInput(f"the DICOM file's {keyword} is missing or malformed")


def value_of(data: Dataset, keyword: str, *, most: int = MAX_VALUE) -> object:
    """The value of an element; None where it is missing or empty.

    Args:
        data: the data set.
        keyword: the element's name in the DICOM dictionary.
        most: bound on its bytes.

    Raises:
        InvalidInput: it is malformed, or larger than allowed.
    """
    if keyword not in data:
        return None
    raw = data.get_item(element_tag(keyword))
    if isinstance(raw, RawDataElement) and len(raw.value or b"") > most:
        raise InvalidInput(f"the DICOM file's {keyword} is too long")
    try:
        value: object = data[keyword].value
    except Exception:  # pydicom's converters raise whatever they meet
        raise malformed(keyword) from None
    return None if value == "" else value


def items_of(data: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is missing.

    Raises:
        InvalidInput: it is malformed.
        TooLarge: it has too many items and elements.
    """
    if keyword not in data:
        return []
    found = data.get_item(element_tag(keyword))
    if not isinstance(found, RawDataElement):  # of undefined length: it had to be read with what stands around it
        if not isinstance(found.value, Sequence):
            raise malformed(keyword)
        return list(found.value)
    stream = Stream(found.value or b"")
    implicit = found.is_implicit_VR or found.VR == "UN"
    try:
        return list(read_sequence(stream, implicit, found.is_little_endian, found.length, default_encoding))
    except Exception:
        raise malformed(keyword) from None
    finally:
        stream.check()


def integers_of(data: Dataset, keyword: str) -> list[int]:
    """The values of an element that holds integers; none where it is missing.

    Raises:
        InvalidInput: it holds something else.
    """
    values = _several(value_of(data, keyword))
    if not all(isinstance(one, int) for one in values):
        raise malformed(keyword)
    return [int(one) for one in values if isinstance(one, int)]


def integer_of(data: Dataset, keyword: str) -> int:
    """The value of an element that holds one integer.

    Raises:
        InvalidInput: it is missing, or holds something else.
    """
    values = integers_of(data, keyword)
    if len(values) != 1:
        raise malformed(keyword)
    return values[0]


def first_number_of(data: Dataset, keyword: str) -> float | None:
    """The first value of an element that holds decimals; None where it is missing.

    Raises:
        InvalidInput: the value is no finite number.
    """
    values = _several(value_of(data, keyword))
    if not values:
        return None
    if not isinstance(values[0], int | float) or not math.isfinite(values[0]):
        raise malformed(keyword)
    return float(values[0])


def _several(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, MultiValue | list) else [value]
