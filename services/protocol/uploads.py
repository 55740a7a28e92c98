"""The form in which people ask: one image a request, as a file of a form, and an answer in JSON.

    POST /predict, multipart/form-data, field `file` → {"label", "labels", "probabilities"}
                                                     → {"labels", "mask"} from a segmenter

This is what many models that are served already speak, and all that some do. 8 bits a pixel travel, and perhaps nothing
but a label, or each pixel's class, comes back.
"""

import base64
import json
import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.protocol.errors import ServiceError, UpstreamInvalid
from services.protocol.images import encode_png
from services.protocol.masks import decode_mask

FIELD = "file"
"""The form's field with the image."""

_WORDS_LENGTH = 200
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Told:
    """An answer to one image.

    Attributes:
        scores: (K,) float32, finite; one-hot where the answer had a label and no probabilities. (K,H,W), one-hot at
            every pixel, where it had a mask.
        labels: Names of the K classes, in the order of the scores; None where the answer did not name them.
    """

    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...] | None


def encode_upload(image: npt.NDArray[np.floating]) -> tuple[bytes, dict[str, str]]:
    """An image (C,H,W) in [0,1], C 1 or 3, as the body and the headers of a form with one 8-bit PNG."""
    png = encode_png(image)
    boundary = secrets.token_hex(16)  # 128 random bits do not occur in the PNG
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="{FIELD}"; filename="image.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = b"".join((head.encode(), png, f"\r\n--{boundary}--\r\n".encode()))
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def read_told(content: bytes, *, size: tuple[int, int]) -> Told:
    """Reads the JSON answer to one image.

    `probabilities` are taken where there are any, in the order of `labels`; else `mask` is, or else `label`, as one-hot
    vectors, whose classes `labels` has to name.

    Args:
        content: the answer's body.
        size: (height, width) of the image, which a mask has to have too.

    Raises:
        UpstreamInvalid: It is no such answer; the message says what is missing.
    """
    try:
        answer = json.loads(content)
    except ValueError as error:
        raise UpstreamInvalid(f"the victim's answer to an image is no JSON: {error}") from error
    if not isinstance(answer, dict):
        raise UpstreamInvalid("the victim's answer to an image is no JSON object")
    labels = _labels(answer.get("labels"))
    if answer.get("probabilities") is not None:
        scores = _numbers(answer["probabilities"])
        if labels is not None and len(labels) != len(scores):
            raise UpstreamInvalid(f"the victim's answer has {len(scores)} probabilities for {len(labels)} labels")
        return Told(scores, labels)
    if answer.get("mask") is not None:
        if labels is None:
            raise UpstreamInvalid(
                "the victim's answer to an image is a mask whose classes are unknown: let it name them all, in `labels`"
            )
        return Told(_one_hot(answer["mask"], len(labels), size), labels)
    label = answer.get("label")
    if not isinstance(label, str):
        found = ", ".join(map(repr, answer))[:_WORDS_LENGTH] or "nothing"
        raise UpstreamInvalid(f"the victim's answer to an image has no probabilities, mask or label, but {found}")
    if labels is None:
        raise UpstreamInvalid(
            f"the victim's answer to an image is the label {label[:_WORDS_LENGTH]!r} alone: without probabilities its "
            "classes have to be known, so let it name them all, in `labels`"
        )
    if label not in labels:
        raise UpstreamInvalid(f"the victim's label {label[:_WORDS_LENGTH]!r} is none of its `labels`")
    return Told((np.array(labels) == label).astype(np.float32), labels)


def _labels(labels: object) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
        raise UpstreamInvalid("the victim's `labels` are no list of names")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UpstreamInvalid("the victim's `labels` are not two or more different names")
    return tuple(labels)


def _one_hot(mask: object, count: int, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The mask's classes as scores (K,H,W)."""
    if not isinstance(mask, str):
        raise UpstreamInvalid("the victim's `mask` is no PNG in base64")
    try:
        png = base64.b64decode(mask, validate=True)
    except ValueError as error:
        raise UpstreamInvalid(f"the victim's `mask` is no base64: {error}") from error
    try:
        classes = decode_mask(png, count, size)
    except ServiceError as error:
        raise UpstreamInvalid(f"the victim's `mask` cannot be used: {error.message}") from error
    scores: npt.NDArray[np.float32] = (classes == np.arange(count)[:, None, None]).astype(np.float32)
    return scores


def _numbers(probabilities: object) -> npt.NDArray[np.float32]:
    is_list = isinstance(probabilities, list) and all(type(one) in (int, float) for one in probabilities)
    if not is_list or not isinstance(probabilities, list) or not probabilities:
        raise UpstreamInvalid("the victim's `probabilities` are no list of numbers")
    if not all(-_LARGEST <= one <= _LARGEST for one in probabilities):  # false for NaN, and any integer can be compared
        raise UpstreamInvalid("the victim answered probabilities that are not finite")
    return np.array(probabilities, dtype=np.float32)
