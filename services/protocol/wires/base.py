"""What all wires share: their form, and what is known of an answer once it is read."""

import base64
from dataclasses import dataclass
from typing import Protocol

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol.errors import UpstreamInvalid
from services.protocol.masks import encode_mask

Encoded = tuple[bytes, dict[str, str]]
"""The body of a request, and its own headers."""


@dataclass(frozen=True)
class Scored:
    """An answer.

    Attributes:
        scores: (N,K), or (N,K,H,W) from a segmenter; float32, finite. One-hot where it had labels or a mask only.
        labels: Names of the K classes, in the order of the scores; None where nobody names them.
    """

    scores: npt.NDArray[np.float32]
    labels: tuple[str, ...] | None


class Wire(Protocol):
    """How images travel to a victim, and what its answers mean."""

    @property
    def largest(self) -> int | None:
        """Most images that one request may hold; None: any number."""

    def encode(self, images: npt.NDArray[np.float32]) -> Encoded:
        """The request for the scores of images (N,C,H,W), N at least 1 and at most `largest`.

        Raises:
            ServiceError: the victim does not take such images.
        """

    def read(self, response: httpx.Response, asked: tuple[int, ...]) -> Scored:
        """The answer to images of shape `asked`, (N,C,H,W).

        Raises:
            UpstreamInvalid: it holds no scores for them; the message says what it holds.
        """

    def encode_question(self, image: npt.NDArray[np.float32]) -> Encoded:
        """The request for a description of an image (C,H,W) with the names of the classes."""

    def read_description(self, response: httpx.Response, asked: tuple[int, ...]) -> dict[str, object]:
        """The answer to that request, `asked` being (C,H,W), with the members that `describe` of the client has.

        Raises:
            UpstreamInvalid: it is no such answer.
        """


def named(scores: npt.NDArray[np.float32], labels: tuple[str, ...] | None) -> Scored:
    """Scores and the names that somebody else gave their classes; raises UpstreamInvalid where they do not fit."""
    if labels is not None and len(labels) != scores.shape[1]:
        raise UpstreamInvalid(f"the victim answers scores of {scores.shape[1]} classes, for {len(labels)} labels")
    return Scored(scores, labels)


def own_description(response: httpx.Response) -> dict[str, object]:
    """A description in the form that this project's services answer in, just as it is.

    Raises:
        UpstreamInvalid: it is no such answer.
    """
    try:
        answer = response.json()
    except ValueError as error:
        raise UpstreamInvalid(f"the victim's answer is no JSON: {error}") from error
    if not isinstance(answer, dict) or "labels" not in answer or not answer.keys() & {"label", "mask"}:
        raise UpstreamInvalid("the victim's answer has no labels, or neither a label nor a mask")
    return answer


def described(told: Scored) -> dict[str, object]:
    """A description in the same form, from the answer to one image; classes without names are numbered."""
    scores = told.scores[0]
    labels = list(told.labels or map(str, range(len(scores))))
    if scores.ndim == 1:
        return {"label": labels[int(scores.argmax())], "labels": labels, "probabilities": scores.tolist()}
    mask = encode_mask(scores.argmax(0).astype(np.uint8), len(scores))
    return {"labels": labels, "mask": base64.b64encode(mask).decode()}
