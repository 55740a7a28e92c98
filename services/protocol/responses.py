"""From scores to the answer, in the form in which the question came."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from fastapi.responses import JSONResponse, Response

from services.protocol import oip
from services.protocol.masks import class_map, encode_mask
from services.protocol.requests import MASK_TYPE, PredictRequest

RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": (
            "To an image: JSON, with `label`, `labels` and `probabilities` from a classifier, or `labels`, "
            "`lesion_fraction` and `mask` (base64 PNG, as large as the image) from a segmenter; with "
            "`Accept: image/png`, a segmenter's mask itself. To tensors: scores (N,K), or (N,K,H,W) from a segmenter, "
            "by the Open Inference Protocol, in JSON or binary."
        ),
        "content": {
            oip.JSON_TYPE: {
                "examples": {
                    "class": {
                        "summary": "of an image, by a classifier",
                        "value": {"label": "glioma", "labels": ["glioma", "notumor"], "probabilities": [0.97, 0.03]},
                    },
                    "mask": {
                        "summary": "of an image, by a segmenter",
                        "value": {
                            "labels": ["background", "lesion"],
                            "lesion_fraction": 0.08,
                            "mask": "iVBORw0KGgo...",
                        },
                    },
                    "tensor": {
                        "summary": "of tensors",
                        "value": {
                            "model_name": "defended",
                            "model_version": "1",
                            "outputs": [
                                {"name": "probabilities", "shape": [1, 2], "datatype": "FP32", "data": [0.97, 0.03]}
                            ],
                        },
                    },
                }
            },
            oip.BINARY_TYPE: {},
            MASK_TYPE: {},
        },
    }
}
"""What `respond` says, for the OpenAPI document."""


@dataclass(frozen=True)
class Signature:
    """Who answers.

    Attributes:
        model_name: the name in tensor answers.
        model_version: the version in tensor answers.
        labels: names of the K classes.
        extra: added to answers to images.
        parameters: added to tensor answers.
        headers: added to all answers.
    """

    model_name: str
    model_version: str
    labels: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


async def respond(request: PredictRequest, scores: npt.NDArray[np.float32], signature: Signature) -> Response:
    """The answer to a request, in the request's own form.

    Args:
        request: what was asked.
        scores: (N,K), or (N,K,H,W) from a segmenter; finite. An image is answered with a mask of its own size then.
        signature: who answers.
    """
    if request.form == "tensor":
        return tensor_response(request, {oip.OUTPUT: scores}, signature)
    if scores.ndim == 4:
        return await anyio.to_thread.run_sync(_class_map_response, request, scores[0], signature)
    told = {
        "label": signature.labels[int(scores[0].argmax())],
        "labels": list(signature.labels),
        "probabilities": scores[0].tolist(),
    }
    return JSONResponse({**told, **signature.extra}, headers=dict(signature.headers))


def tensor_response(request: PredictRequest, tensors: Mapping[str, npt.NDArray[Any]], signature: Signature) -> Response:
    """The answer to a request that came as a tensor.

    Args:
        request: what was asked.
        tensors: all outputs by name; those that the request does not ask for are left out.
        signature: who answers.
    """
    body, own = oip.encode_response(
        [(oip.Tensor(name, tensors[name]), binary) for name, binary in request.outputs.items()],
        model_name=signature.model_name,
        model_version=signature.model_version,
        request_id=request.id,
        parameters=dict(signature.parameters),
    )
    return Response(body, headers={**signature.headers, **own})


def _class_map_response(request: PredictRequest, scores: npt.NDArray[np.float32], signature: Signature) -> Response:
    """The answer to an image with the scores (K,h,w) of its pixels."""
    assert request.size is not None  # it came as an image
    classes = class_map(scores, request.size)
    return mask_response(
        request, encode_mask(classes, len(scores)), np.count_nonzero(classes) / classes.size, signature
    )


def mask_response(request: PredictRequest, png: bytes, lesion_fraction: float, signature: Signature) -> Response:
    """The answer to an image with its mask: in JSON, or the PNG itself where the client likes that better.

    Args:
        request: what was asked.
        png: the mask, as large as the image.
        lesion_fraction: share of the mask's pixels whose class is not 0.
        signature: who answers.
    """
    headers = dict(signature.headers)
    if request.wants_png:
        return Response(png, headers=headers, media_type=MASK_TYPE)
    told = {
        "labels": list(signature.labels),
        "lesion_fraction": lesion_fraction,
        "mask": base64.b64encode(png).decode(),
    }
    return JSONResponse({**told, **signature.extra}, headers=headers)
