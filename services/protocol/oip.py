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

import numpy.typing as npt

from services.protocol.datatypes import from_bytes
from services.protocol.errors import InvalidInput, Unsupported
from services.protocol.tensors import HEADER as HEADER
from services.protocol.tensors import Tensor as Tensor
from services.protocol.tensors import decode_tensors, encode_tensors, entries_of, flag, parameters_of

INPUT = "images"
"""The name that this project gives to its only input (N,C,H,W)."""

OUTPUT = "probabilities"
"""The name that this project gives to its only output (N,K), or (N,K,H,W) of a segmenter."""

JSON_TYPE = "application/json"
BINARY_TYPE = "application/octet-stream"

_TIMEOUT = "timeout"


@dataclass(frozen=True)
class Request:
    """A decoded inference request.

    Attributes:
        inputs: at least one tensor, names unique.
        id: to be echoed in the answer.
        outputs: for each output asked for by name, whether it shall be binary; empty: all outputs.
        binary_default: whether outputs that say nothing themselves shall be binary.
        timeout_s: seconds that the client waits for the answer; None: it does not say.
    """

    inputs: tuple[Tensor, ...]
    id: str | None = None
    outputs: dict[str, bool] = field(default_factory=dict)
    binary_default: bool = False
    timeout_s: float | None = None

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
    entries, parts = encode_tensors([(tensor, binary) for tensor in inputs])
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
    entries, parts = encode_tensors(outputs)
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
    parameters = parameters_of(message, "the request")
    identity = message.get("id")
    if identity is not None and not isinstance(identity, str):
        raise InvalidInput("'id' must be a string")
    default = flag(parameters, "binary_data_output", False)
    outputs: dict[str, bool] = {}
    for name, _, options in entries_of(message, "outputs", required=False):
        if "classification" in options:
            raise Unsupported("classification outputs are not supported")
        outputs[name] = flag(options, "binary_data", default)
    return Request(decode_tensors(message, "inputs", rest), identity, outputs, default, _timeout_s(parameters))


def decode_response(body: bytes, json_length: int | None, *, only: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """Decodes an answer into its outputs by name; with `only`, others are passed over whatever their datatype.

    Raises:
        InvalidInput: the message is malformed.
        Unsupported: it uses a part of the protocol that is not implemented.
    """
    message, rest = _split(body, json_length)
    return {tensor.name: tensor.array for tensor in decode_tensors(message, "outputs", rest, only)}


def _timeout_s(parameters: dict[str, Any]) -> float | None:
    """Triton's parameter, microseconds of which 0 is no bound, in seconds."""
    timeout = parameters.get(_TIMEOUT, 0)
    if not isinstance(timeout, int) or isinstance(timeout, bool) or not 0 <= timeout < 2**63:
        raise InvalidInput(f"parameter {_TIMEOUT!r} must be a whole number of microseconds")
    return timeout / 1e6 or None


def _message(head: dict[str, Any], parts: Sequence[bytes | memoryview]) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    if not parts:
        return text, {"Content-Type": JSON_TYPE}
    return b"".join([text, *parts]), {"Content-Type": BINARY_TYPE, HEADER: str(len(text))}


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
