"""From an HTTP request to the images in it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from services.protocol import oip
from services.protocol.deadlines import in_time, narrow
from services.protocol.decoding.pool import DecodingPool
from services.protocol.errors import ClientGone, InvalidInput, UnsupportedMedia
from services.protocol.limits import inflate

_FORM_TYPE = "multipart/form-data"
_FIELD = "file"
# None: tritonclient's synchronous client sends no type at all. The last one: what `curl -d` says unasked.
_TENSOR_TYPES = (None, oip.JSON_TYPE, oip.BINARY_TYPE, "application/x-www-form-urlencoded")
_LEVELS = {"UINT8": 255, "UINT16": 65535}
_AT_ONCE: Final = 2**16
"""Bytes of tensors that are decoded sooner than a thread could be asked to."""

MASK_TYPE = "image/png"
_DICOM_TYPE = "application/dicom"
_FRAME = "frame"
_FRAME_SCHEMA = {"type": "integer", "minimum": 1}

REQUEST: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": _FRAME,
            "in": "query",
            "description": "number of the frame of a DICOM file, from 1; needed where it has several",
            "schema": _FRAME_SCHEMA,
        }
    ],
    "requestBody": {
        "required": True,
        "description": (
            "An image: PNG, JPEG, TIFF (its first page) or DICOM (one frame; nothing but its pixels is read), told by "
            "its content, of any size. Or tensors, by the Open Inference Protocol."
        ),
        "content": {
            _FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "required": [_FIELD],
                    "properties": {_FIELD: {"type": "string", "format": "binary"}, _FRAME: _FRAME_SCHEMA},
                }
            },
            **{media: {"schema": {"type": "string", "format": "binary"}} for media in ("image/*", _DICOM_TYPE)},
            oip.JSON_TYPE: {
                "schema": {"type": "object", "required": ["inputs"]},
                "example": {
                    "inputs": [{"name": "images", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 0.5, 0.5, 1]}]
                },
            },
            oip.BINARY_TYPE: {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
"""What `read_request` takes, for the OpenAPI document."""


@dataclass(frozen=True)
class PredictRequest:
    """A request to a model, once it is read.

    Attributes:
        images: (N,C,H,W) float32, finite, N at least 1; possibly a read-only view of the request's body.
        form: how it came and how to answer it: an "image" (JSON for people), or a "tensor".
        outputs: the output tensors to answer with, each with whether it shall be binary; empty for an image.
        id: what the client calls this request.
        size: (height, width) of the image as it was uploaded, its orientation tag obeyed; None for tensors.
        wants_png: whether a mask is asked for as the PNG itself.
    """

    images: npt.NDArray[np.float32]
    form: Literal["image", "tensor"]
    outputs: Mapping[str, bool] = field(default_factory=dict)
    id: str | None = None
    size: tuple[int, int] | None = None
    wants_png: bool = False


async def read_request(
    request: Request,
    shape: tuple[int, int, int],
    decoders: DecodingPool,
    *,
    max_body_bytes: int,
    tensors_only: bool = False,
    outputs: Sequence[str] = (oip.OUTPUT,),
) -> PredictRequest:
    """Reads a request: a form's file, an image file as the body, or an Open Inference Protocol request.

    The form has the image in the field `file`. As the body, an image has any image/* type, or application/dicom; what
    it is, its content tells. The frame of a DICOM file is chosen by `frame`, a form's field or a query parameter. The
    deadline that `services.protocol.deadlines` keeps holds for the body too, and tensors may bring it forward.

    Args:
        request: the HTTP request, its body not yet read.
        shape: (C,H,W) of the images that the model takes. Images in a file format are resized to it; tensors must have
            it.
        decoders: what decodes image files.
        max_body_bytes: bound on an inflated body.
        tensors_only: refuse images.
        outputs: names of the output tensors that may be asked for.

    Raises:
        ServiceError: the subclass that says what was wrong.
    """
    media = request.headers.get("Content-Type", "").partition(";")[0].strip().lower() or None
    encoding = request.headers.get("Content-Encoding")
    is_image = media in (_FORM_TYPE, _DICOM_TYPE) or (media or "").startswith("image/")
    if not (media in _TENSOR_TYPES or (is_image and not tensors_only)):
        raise UnsupportedMedia(f"media type {(media or '')[:80]!r} is not supported at this path")
    wants_png = _prefers_png(",".join(request.headers.getlist("Accept")))
    frames: Sequence[object] = request.query_params.getlist(_FRAME)
    if media == _FORM_TYPE:
        if encoding is not None:
            raise UnsupportedMedia("multipart bodies must not be compressed")
        data, more = await _uploaded(request)
        return await _image_request(decoders, data, shape, wants_png, _frame([*frames, *more]))
    try:
        async with in_time():
            body = await request.body()
    except ClientDisconnect as error:
        raise ClientGone("the connection ended before the body did") from error
    if is_image:
        if encoding is not None:
            body = await anyio.to_thread.run_sync(lambda: inflate(body, encoding, max_bytes=max_body_bytes))
        return await _image_request(decoders, body, shape, wants_png, _frame(frames))
    json_length = oip.header_length(request.headers.get(oip.HEADER))

    def decode() -> tuple[PredictRequest, float | None]:
        return _tensor_request(inflate(body, encoding, max_bytes=max_body_bytes), json_length, shape, outputs)

    at_once = encoding is None and len(body) <= _AT_ONCE
    parsed, timeout_s = decode() if at_once else await anyio.to_thread.run_sync(decode)
    if timeout_s is not None:
        narrow(timeout_s)
    return parsed


async def discard_body(request: Request) -> None:
    """Takes a body that nobody looks at: who is answered while sending may lose the answer with the connection.

    Raises:
        ServiceError: it is too large, does not come in time, or its sender is gone.
    """
    try:
        async with in_time():
            async for _ in request.stream():
                pass
    except ClientDisconnect as error:
        raise ClientGone("the connection ended before the body did") from error


async def _uploaded(request: Request) -> tuple[bytes, Sequence[object]]:
    """The content of the form's file, and the form's fields that name a frame."""
    try:
        async with in_time(), request.form(max_files=1, max_fields=8) as form:
            file = form.get(_FIELD)
            if not isinstance(file, UploadFile):
                raise InvalidInput(f"the form needs a file in the field {_FIELD!r}")
            return await file.read(), form.getlist(_FRAME)
    except ClientDisconnect as error:
        raise ClientGone("the connection ended before the body did") from error


def _frame(given: Sequence[object]) -> int | None:
    """The number of the frame that is asked for; None where none is."""
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], str) or not re.fullmatch("[1-9][0-9]{0,8}", given[0], re.ASCII):
        raise InvalidInput(f"{_FRAME!r} is one whole number, from 1")
    return int(given[0])


def _prefers_png(accept: str) -> bool:
    """Whether a PNG is more welcome than JSON, by the weights in an Accept header (RFC 9110, section 12.5.1)."""
    weights: dict[str, float] = {}
    for entry in accept.lower().split(","):
        media, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((one for one in parameters if re.fullmatch(r"q=(0(\.\d{0,3})?|1(\.0{0,3})?)", one)), "q=1")
        weights[media] = float(weight[2:])

    def weight_of(media: str) -> float:
        ranges = (media, f"{media.partition('/')[0]}/*", "*/*")  # the most specific one counts
        return next((weights[one] for one in ranges if one in weights), 0.0)

    return weight_of(MASK_TYPE) > weight_of(oip.JSON_TYPE)


async def _image_request(
    decoders: DecodingPool, data: bytes, shape: tuple[int, int, int], wants_png: bool, frame: int | None
) -> PredictRequest:
    channels, height, width = shape
    async with in_time():
        image, size = await decoders.decode(data, channels=channels, size=(height, width), frame=frame)
    return PredictRequest(image[None], "image", size=size, wants_png=wants_png)


def _tensor_request(
    body: bytes, json_length: int | None, shape: tuple[int, int, int], outputs: Sequence[str]
) -> tuple[PredictRequest, float | None]:
    """The request, and how long its client waits for the answer (None: it does not say)."""
    request = oip.decode_request(body, json_length, raw=oip.RawInput(oip.INPUT, (1, *shape)))
    wanted = request.wanted(outputs)
    if len(request.inputs) != 1:
        raise InvalidInput(f"the model takes one input, not {len(request.inputs)}")
    tensor = request.inputs[0]
    expected = f"[N, {', '.join(map(str, shape))}] with N at least 1"
    if tensor.array.ndim != 4 or tensor.array.shape[1:] != shape or not len(tensor.array):
        raise InvalidInput(f"{tensor.name!r}: expected shape {expected}, got {list(tensor.array.shape)}")
    return PredictRequest(_as_images(tensor), "tensor", wanted, request.id), request.timeout_s


def _as_images(tensor: oip.Tensor) -> npt.NDArray[np.float32]:
    """float32 images: integers are levels of [0,1], floating-point values are taken as they are."""
    if tensor.datatype in _LEVELS:
        return tensor.array.astype(np.float32) / np.float32(_LEVELS[tensor.datatype])
    if tensor.array.dtype.kind != "f":
        raise InvalidInput(f"{tensor.name!r}: images are FP16, FP32, FP64, UINT8 or UINT16, not {tensor.datatype}")
    with np.errstate(over="ignore"):
        images = tensor.array.astype(np.float32, copy=False)
    if not np.isfinite(images).all():
        raise InvalidInput(f"{tensor.name!r} contains values that are not finite")
    return images
