"""Single elements of a DICOM data set: checked, and complained of in words that quote nothing of the file.

pydicom's errors quote what it could not convert. Here every failure is an `InvalidInput` that names the element alone.
"""

import io
import math

from pydicom.charset import default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_sequence
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence

from services.protocol.errors import InvalidInput


def element_tag(keyword: str) -> int:
    """The tag of a keyword of the DICOM dictionary."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"{keyword!r} is no keyword of the DICOM dictionary")
    return tag


def malformed(keyword: str) -> InvalidInput:
    """The error that an element is not what it has to be."""
    return InvalidInput(f"the DICOM file's {keyword} is missing or malformed")


def value_of(data: Dataset, keyword: str) -> object:
    """The value of the element with this keyword; None where it is missing or empty.

    Raises:
        InvalidInput: it is malformed.
    """
    if keyword not in data:
        return None
    try:
        value: object = data[keyword].value
    except MemoryError:
        raise
    except Exception:  # pydicom's converters raise whatever they meet
        raise malformed(keyword) from None
    return None if value == "" else value


def items_of(data: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; none where it is missing.

    Raises:
        InvalidInput: it is malformed.
    """
    if keyword not in data:
        return []
    found = data.get_item(element_tag(keyword))
    if not isinstance(found, RawDataElement):  # of undefined length: it had to be read with what stands around it
        if not isinstance(found.value, Sequence):
            raise malformed(keyword)
        return list(found.value)
    stream = io.BytesIO(found.value or b"")
    implicit = found.is_implicit_VR or found.VR == "UN"
    try:
        return list(read_sequence(stream, implicit, found.is_little_endian, found.length, default_encoding))
    except MemoryError:
        raise
    except Exception:
        raise malformed(keyword) from None


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
