"""Datatypes of the Open Inference Protocol: arrays out of bytes and out of JSON lists, every size checked first."""

import math
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from services.protocol.errors import InvalidInput

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The datatypes with elements of fixed size, as they lie on the wire."""

_MAX_RANK = 16
_MAX_BYTES = 2**48  # no tensor of this world; products below it are safe in every integer type involved
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


def datatype_of(array: npt.NDArray[Any]) -> str:
    """The protocol's name of an array's element type."""
    return _DATATYPES[array.dtype.newbyteorder("<")]


def check_shape(shape: object, name: str) -> tuple[int, ...]:
    """Checks a decoded JSON value to be a shape whose byte count cannot overflow anything.

    Raises:
        InvalidInput: it is not.
    """
    if not isinstance(shape, list) or any(type(side) is not int or side < 0 for side in shape):
        raise InvalidInput(f"{name!r}: 'shape' must be a list of non-negative integers")
    # Zeros are left out of the product: beside one of them the other sides would escape the bound.
    if len(shape) > _MAX_RANK or math.prod(side for side in shape if side) > _MAX_BYTES // 8:
        raise InvalidInput(f"{name!r}: the shape is too large")
    return tuple(shape)


def from_bytes(data: memoryview, shape: tuple[int, ...], datatype: str, what: str) -> npt.NDArray[Any]:
    """A read-only view of a tensor's bytes as an array of a checked shape, without a copy; `what` names it in messages.

    Raises:
        InvalidInput: the number of bytes does not fit, or a BOOL is neither 0 nor 1.
    """
    dtype = DTYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InvalidInput(f"{what} has {len(data)} bytes; {datatype} of shape {list(shape)} takes {expected}")
    if datatype == "BOOL" and (np.frombuffer(data, dtype=np.uint8) > 1).any():
        raise InvalidInput(f"{what}: a BOOL byte must be 0 or 1")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def from_json(data: object, shape: tuple[int, ...], datatype: str, name: str) -> npt.NDArray[Any]:
    """An array from decoded JSON: a flat list, or nested lists of exactly the shape.

    Numbers beyond the range of a floating-point datatype become infinite; everything else that does not fit is refused.

    Args:
        data: the decoded value of `data`; None where the message has none.
        shape: a shape that `check_shape` accepted.
        datatype: a key of `DTYPES`.
        name: the tensor's name, for messages.

    Raises:
        InvalidInput: no list, the wrong number of values, or a value that the datatype does not admit.
    """
    if datatype == "FP16":
        raise InvalidInput(f"{name!r}: FP16 has no JSON form; send it as binary data")
    if not isinstance(data, list):
        raise InvalidInput(f"{name!r} needs 'data' (a list of numbers) or the parameter 'binary_data_size'")
    if any(isinstance(item, list) for item in data[:1]):  # nested: every level must have the length that the shape says
        if not shape or len(data) != shape[0]:
            raise InvalidInput(f"{name!r}: the outer list has {len(data)} entries; the shape is {list(shape)}")
        for side in shape[1:]:
            if any(type(row) is not list or len(row) != side for row in data):
                raise InvalidInput(f"{name!r}: the nested lists do not have the shape {list(shape)}")
            data = list(chain.from_iterable(data))
    if len(data) != math.prod(shape):
        raise InvalidInput(f"{name!r} has {len(data)} values; the shape {list(shape)} takes {math.prod(shape)}")
    dtype = DTYPES[datatype]
    if not set(map(type, data)) <= _JSON_TYPES.get(dtype.kind, {int}):
        raise InvalidInput(f"{name!r}: 'data' contains a value that is no {datatype}")
    if dtype.kind in "iu" and data:
        limits = np.iinfo(dtype)
        if min(data) < limits.min or max(data) > limits.max:
            raise InvalidInput(f"{name!r}: 'data' contains a value outside the range of {datatype}")
    try:
        with np.errstate(over="ignore"):  # too large for FP32 becomes infinite, which callers refuse anyway
            return np.array(data, dtype=dtype).reshape(shape)
    except OverflowError as error:
        raise InvalidInput(f"{name!r}: 'data' contains a number that is too large") from error
