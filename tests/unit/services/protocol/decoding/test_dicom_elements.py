import struct

import numpy as np
import pytest
from dicom_files import dataset, lookup_table
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from services.protocol.decoding.dicom_elements import (
    element_tag,
    first_number_of,
    integer_of,
    integers_of,
    items_of,
    value_of,
)
from services.protocol.errors import InvalidInput


def raw(keyword: str, kind: str | None, value: bytes) -> Dataset:
    """A data set with an element as a file has it, not converted yet."""
    tag = BaseTag(element_tag(keyword))
    return Dataset({tag: RawDataElement(tag, kind, len(value), value, 0, kind is None, True)})


def test_values_are_converted_or_none() -> None:
    assert value_of(raw("Rows", "US", b"\x07\0"), "Rows") == 7
    assert value_of(raw("Rows", None, b"\x07\0"), "Rows") == 7
    assert value_of(Dataset(), "Rows") is None
    assert value_of(raw("PhotometricInterpretation", "CS", b""), "PhotometricInterpretation") is None
    assert integers_of(raw("LUTDescriptor", "US", b"\1\0\2\0\3\0"), "LUTDescriptor") == [1, 2, 3]
    assert integers_of(Dataset(), "LUTDescriptor") == []
    assert first_number_of(raw("WindowWidth", "DS", rb" 1.5\2 "), "WindowWidth") == 1.5
    assert first_number_of(Dataset(), "WindowWidth") is None


def test_only_names_of_elements_have_tags() -> None:
    assert element_tag("Rows") == 0x00280010
    with pytest.raises(ValueError, match="'Sentinel' is no keyword"):
        element_tag("Sentinel")


@pytest.mark.parametrize(
    ("keyword", "kind", "value"),
    [
        ("Rows", "US", b"\7"),
        ("Rows", "US", b"\1\0\2\0"),
        ("Rows", "US", b""),
        ("Rows", "LO", b"SENTINEL"),
        ("Rows", "ZZ", b"SENTINEL"),
        ("NumberOfFrames", "IS", b"SENTINEL"),
        ("NumberOfFrames", "IS", b"1.5"),
    ],
)
def test_what_is_not_one_integer_is_refused_by_its_name_alone(keyword: str, kind: str, value: bytes) -> None:
    with pytest.raises(InvalidInput, match=f"^the DICOM file's {keyword} is missing or malformed$") as caught:
        integer_of(raw(keyword, kind, value), keyword)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("value", [b"SENTINEL", b"nan ", b"inf ", b"1e999 "])
def test_what_is_no_finite_number_is_refused(value: bytes) -> None:
    with pytest.raises(InvalidInput, match="WindowWidth is missing or malformed"):
        first_number_of(raw("WindowWidth", "DS", value), "WindowWidth")


def one_item(implicit: bool = True) -> bytes:
    rows = struct.pack("<HHI" if implicit else "<HH2sH", 0x0028, 0x0010, *((2,) if implicit else (b"US", 2))) + b"\7\0"
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(rows)) + rows


@pytest.mark.parametrize(("kind", "implicit"), [(None, True), ("SQ", False), ("UN", True)])
def test_items_are_read_from_sequences(kind: str | None, implicit: bool) -> None:
    items = items_of(raw("VOILUTSequence", kind, one_item(implicit) * 3), "VOILUTSequence")
    assert [integer_of(item, "Rows") for item in items] == [7, 7, 7]


def test_items_may_have_been_read_or_be_missing() -> None:
    made = dataset(np.uint8([[1]]))
    assert items_of(made, "VOILUTSequence") == []
    made.VOILUTSequence = [lookup_table(0, [1, 2], 8)]
    assert len(items_of(made, "VOILUTSequence")) == 1
    assert items_of(raw("VOILUTSequence", "SQ", b""), "VOILUTSequence") == []


def test_what_is_no_sequence_is_refused() -> None:
    for value in (b"SENTI", one_item() + b"\0"):
        with pytest.raises(InvalidInput, match="VOILUTSequence is missing or malformed"):
            items_of(raw("VOILUTSequence", None, value), "VOILUTSequence")
    made = Dataset()
    made.add_new(element_tag("VOILUTSequence"), "LO", "SENTINEL")
    with pytest.raises(InvalidInput, match="VOILUTSequence is missing or malformed"):
        items_of(made, "VOILUTSequence")
