"""The named tensors of the Open Inference Protocol's messages: entries of the JSON part, their bytes perhaps behind it.

Everything malformed raises `InvalidInput`, a BYTES tensor or shared memory `Unsupported`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.protocol.datatypes import DTYPES, check_shape, datatype_of, from_bytes, from_json
from services.protocol.errors import InvalidInput, Unsupported

HEADER = "Inference-Header-Content-Length"
"""The HTTP header that holds the length of the JSON part in bytes."""


@dataclass(frozen=True)
class Tensor:
    """A named array on the wire; a decoded one may be a read-only view of the message."""

    name: str
    array: npt.NDArray[Any]

    @property
    def datatype(self) -> str:
        """The protocol's name of the element type."""
        return datatype_of(self.array)


def encode_tensors(tensors: Sequence[tuple[Tensor, bool]]) -> tuple[list[dict[str, Any]], list[memoryview]]:
    """The entries of tensors, each with whether it shall be binary, and the bytes of those that are.

    Raises:
        InvalidInput: an FP16 tensor that shall not be binary; JSON has no form for it.
    """
    entries: list[dict[str, Any]] = []
    parts: list[memoryview] = []
    for tensor, binary in tensors:
        array = np.ascontiguousarray(tensor.array, dtype=tensor.array.dtype.newbyteorder("<"))
        datatype = tensor.datatype
        entry: dict[str, Any] = {"name": tensor.name, "shape": list(array.shape), "datatype": datatype}
        if binary:
            parts.append(array.reshape(-1).view(np.uint8).data)
            entry["parameters"] = {"binary_data_size": array.nbytes}
        elif datatype == "FP16":
            raise InvalidInput("FP16 has no JSON form; ask for binary data")
        else:
            entry["data"] = array.reshape(-1).tolist()
        entries.append(entry)
    return entries, parts


def parameters_of(owner: dict[str, Any], what: str) -> dict[str, Any]:
    """The `parameters` of a message, a tensor or an output (`what`, for the error); empty: it has none."""
    parameters = owner.get("parameters")
    if parameters is None:  # KServe's Python server says null
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f"'parameters' of {what} must be an object")
    return parameters


def flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    """A parameter that is true or false; `default`: it is not there."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name!r} must be true or false")
    return value


def entries_of(
    message: dict[str, Any], key: str, *, required: bool
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The entries of `inputs` or `outputs` as (name, entry, parameters), names unique."""
    entries = message.get(key, [])
    if not isinstance(entries, list) or (required and not entries):
        raise InvalidInput(f"{key!r} must be a list of tensors" + (" with at least one entry" if required else ""))
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise InvalidInput(f"every entry of {key!r} must be an object with a 'name'")
        if name in found:
            raise InvalidInput(f"{key!r} names {name!r} twice")
        parameters = parameters_of(entry, repr(name))
        if "shared_memory_region" in parameters:
            raise Unsupported("shared memory is not supported")
        found[name] = (name, entry, parameters)
    return list(found.values())


def decode_tensors(
    message: dict[str, Any], key: str, rest: memoryview | None, only: str | None = None
) -> tuple[Tensor, ...]:
    """The tensors of `inputs` or `outputs`.

    Args:
        message: the JSON part.
        key: which of the two.
        rest: the bytes behind the JSON part; None: the message does not say that there may be any.
        only: the tensor to decode; others, whatever their datatype, are passed over. None: all.
    """
    tensors = []
    for name, entry, parameters in entries_of(message, key, required=True):
        data = _own_bytes(name, entry, parameters.get("binary_data_size"), rest)
        if rest is not None and data is not None:
            rest = rest[len(data) :]
        if only in (None, name):
            tensors.append(Tensor(name, _decode_tensor(name, entry, data)))
    if rest:
        raise InvalidInput(f"{len(rest)} bytes are left over behind the last tensor")
    return tuple(tensors)


def _own_bytes(name: str, entry: dict[str, Any], size: object, rest: memoryview | None) -> memoryview | None:
    """The bytes of a tensor, which come next in the rest; None: it is in the JSON part."""
    if size is None:
        return None
    if "data" in entry:
        raise InvalidInput(f"{name!r} has both 'data' and 'binary_data_size'")
    if type(size) is not int or size < 0:
        raise InvalidInput(f"{name!r}: 'binary_data_size' must be a number of bytes")
    if rest is None:
        raise InvalidInput(f"{name!r} is binary, but the header {HEADER} is missing")
    if size > len(rest):
        raise InvalidInput(f"{name!r} announces {size} bytes, but only {len(rest)} are left in the body")
    return rest[:size]


def _decode_tensor(name: str, entry: dict[str, Any], data: memoryview | None) -> npt.NDArray[Any]:
    shape = check_shape(entry.get("shape"), name)
    datatype = entry.get("datatype")
    if datatype == "BYTES":
        raise Unsupported(f"{name!r}: BYTES tensors are not supported")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InvalidInput(f"{name!r}: unknown datatype {datatype!r:.40}; known are {', '.join(DTYPES)}")
    if data is None:
        return from_json(entry.get("data"), shape, datatype, name)
    return from_bytes(data, shape, datatype, repr(name))
