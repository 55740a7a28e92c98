"""The Open Inference Protocol, version 2, with the binary tensor extension: pure functions between bytes and arrays.

A message is a JSON object, optionally followed by raw tensors (little-endian, row-major, no padding) in the order in
which the object names them; the header `Inference-Header-Content-Length` then tells where the JSON ends.

Everything malformed raises `InvalidInput`; BYTES tensors, shared memory and classification outputs raise `Unsupported`.
Whether the values fit a model (shape, range, finite) is for the caller to check.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from services.protocol.datatypes import DTYPES, check_shape, datatype_of, from_bytes, from_json
from services.protocol.errors import InvalidInput, Unsupported

HEADER = "Inference-Header-Content-Length"
"""The HTTP header that holds the length of the JSON part in bytes."""

INPUT = "images"
"""The name that this project gives to its only input (N,C,H,W)."""

OUTPUT = "probabilities"
"""The name that this project gives to its only output (N,K), or (N,K,H,W) of a segmenter."""

JSON_TYPE = "application/json"
BINARY_TYPE = "application/octet-stream"


@dataclass(frozen=True)
class Tensor:
    """A named array on the wire; a decoded one may be a read-only view of the message."""

    name: str
    array: npt.NDArray[Any]

    @property
    def datatype(self) -> str:
        """The protocol's name of the element type."""
        return datatype_of(self.array)


@dataclass(frozen=True)
class Request:
    """A decoded inference request.

    Attributes:
        inputs: at least one tensor, names unique.
        id: to be echoed in the answer.
        outputs: for each output asked for by name, whether it shall be binary; empty: all outputs.
        binary_default: whether outputs that say nothing themselves shall be binary.
    """

    inputs: tuple[Tensor, ...]
    id: str | None = None
    outputs: dict[str, bool] = field(default_factory=dict)
    binary_default: bool = False

    def wanted(self, offered: Sequence[str]) -> dict[str, bool]:
        """The outputs to answer with, in the order of the offer, each with whether it shall be binary.

        Args:
            offered: the names of all outputs that there are.

        Raises:
            InvalidInput: outputs were asked for by name, and one of them is not offered.
        """
        if not set(self.outputs) <= set(offered):
            there_are = "only output is" if len(offered) == 1 else "outputs are"
            raise InvalidInput(
                f"the {there_are} {', '.join(map(repr, offered))}; "
                f"the request asks for {', '.join(map(repr, self.outputs))}"
            )
        return {
            name: self.outputs.get(name, self.binary_default)
            for name in offered
            if name in self.outputs or not self.outputs
        }


@dataclass(frozen=True)
class RawInput:
    """What the body of a raw request (no JSON at all) is taken to be: one tensor of this name, shape and datatype."""

    name: str
    shape: tuple[int, ...]
    datatype: str = "FP32"


def header_length(value: str | None) -> int | None:
    """Reads the header that tells the length of the JSON part; None: the header is absent, all of the body is JSON."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()) or len(value) > 15:
        raise InvalidInput(f"{HEADER} is {value[:40]!r}; it must be a number of bytes")
    return int(value)


def encode_request(
    inputs: Sequence[Tensor], *, binary: bool = True, binary_output: bool = True, output: str | None = None
) -> tuple[bytes, dict[str, str]]:
    """Encodes a request; returns the body and its HTTP headers.

    Args:
        inputs: what is sent.
        binary: whether it travels in binary; else in JSON.
        binary_output: whether the answer shall be binary; where not, nothing of that extension is mentioned.
        output: the only output that is asked for, by name; None: all.

    Raises:
        InvalidInput: an FP16 tensor in JSON.
    """
    entries, parts = _encode_tensors([(tensor, binary) for tensor in inputs])
    request: dict[str, Any] = {"inputs": entries}
    if output is not None:
        request["outputs"] = [{"name": output, **({"parameters": {"binary_data": True}} if binary_output else {})}]
    elif binary_output:
        request["parameters"] = {"binary_data_output": True}
    return _message(request, parts)


def encode_response(
    outputs: Sequence[tuple[Tensor, bool]],
    *,
    model_name: str,
    model_version: str,
    request_id: str | None = None,
    parameters: dict[str, Any] | None = None,
) -> tuple[bytes, dict[str, str]]:
    """Encodes an answer, each output with whether it shall be binary; returns the body and its HTTP headers."""
    entries, parts = _encode_tensors(outputs)
    answer: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        answer["id"] = request_id
    if parameters:
        answer["parameters"] = parameters
    return _message({**answer, "outputs": entries}, parts)


def decode_request(body: bytes, json_length: int | None, *, raw: RawInput | None = None) -> Request:
    """Decodes the body of an inference request.

    Args:
        body: all of the body, uncompressed.
        json_length: what `header_length` read.
        raw: how to read a raw request (`json_length` 0), which is answered in binary; None: refuse it.

    Raises:
        InvalidInput: the message is malformed.
        Unsupported: it uses a part of the protocol that is not implemented.
    """
    if json_length == 0:
        if raw is None:
            raise Unsupported("raw requests are not supported here")
        array = from_bytes(memoryview(body), raw.shape, raw.datatype, f"the raw input (one {raw.name!r})")
        return Request(inputs=(Tensor(raw.name, array),), binary_default=True)
    message, rest = _split(body, json_length)
    parameters = _parameters(message, "the request")
    identity = message.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InvalidInput("'id' must be a string")
    default = _flag(parameters, "binary_data_output", False)
    outputs: dict[str, bool] = {}
    for name, _, options in _entries(message, "outputs", required=False):
        if "classification" in options:
            raise Unsupported("classification outputs are not supported")
        outputs[name] = _flag(options, "binary_data", default)
    return Request(_decode_tensors(message, "inputs", rest), identity, outputs, default)


def decode_response(body: bytes, json_length: int | None, *, only: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """Decodes an answer into its outputs by name.

    Args:
        body: all of the body, uncompressed.
        json_length: what `header_length` read.
        only: the output to decode; others, whatever their datatype, are passed over. None: all.

    Raises:
        InvalidInput: the message is malformed.
        Unsupported: it uses a part of the protocol that is not implemented.
    """
    message, rest = _split(body, json_length)
    return {tensor.name: tensor.array for tensor in _decode_tensors(message, "outputs", rest, only)}


def _message(head: dict[str, Any], parts: Sequence[bytes | memoryview]) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    if not parts:
        return text, {"Content-Type": JSON_TYPE}
    return b"".join([text, *parts]), {"Content-Type": BINARY_TYPE, HEADER: str(len(text))}


def _encode_tensors(tensors: Sequence[tuple[Tensor, bool]]) -> tuple[list[dict[str, Any]], list[memoryview]]:
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


def _refuse_constant(constant: str) -> NoReturn:
    raise InvalidInput(f"the JSON part contains {constant}, which is no JSON")


def _split(body: bytes, json_length: int | None) -> tuple[dict[str, Any], memoryview | None]:
    """The JSON object, and the bytes behind it (None: the message does not say that there may be any)."""
    if json_length is not None and json_length > len(body):
        raise InvalidInput(f"{HEADER} is {json_length}, but the body has only {len(body)} bytes")
    try:
        message = json.loads(body[:json_length], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # JSON or UTF-8
        raise InvalidInput(f"the JSON part of the message is malformed: {error}") from error
    if not isinstance(message, dict):
        raise InvalidInput("the message must be a JSON object")
    return message, None if json_length is None else memoryview(body)[json_length:]


def _parameters(owner: dict[str, Any], what: str) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:  # null, as KServe's Python server says it, is none
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInput(f"'parameters' of {what} must be an object")
    return parameters


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name!r} must be true or false")
    return value


def _entries(message: dict[str, Any], key: str, *, required: bool) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
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
        parameters = _parameters(entry, repr(name))
        if "shared_memory_region" in parameters:
            raise Unsupported("shared memory is not supported")
        found[name] = (name, entry, parameters)
    return list(found.values())


def _decode_tensors(
    message: dict[str, Any], key: str, rest: memoryview | None, only: str | None = None
) -> tuple[Tensor, ...]:
    tensors = []
    for name, entry, parameters in _entries(message, key, required=True):
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
