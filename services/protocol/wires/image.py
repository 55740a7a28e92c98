"""The form in which people ask: one image a request, as an 8-bit PNG, and an answer in JSON.

    POST /predict, multipart/form-data, field `file` → {"label", "labels", "probabilities"}
                                                     → {"labels", "mask"} from a segmenter

This is what many models that are served already speak, and all that some do; a mapping file describes those that speak
otherwise. 8 bits a pixel travel, and perhaps nothing but a label, or each pixel's class, comes back.
"""

import base64
import json
import secrets

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol.images import encode_png
from services.protocol.mapping import Answer, Sending
from services.protocol.wires.base import Encoded, Scored, described, own_description
from services.protocol.wires.json_responses import read_response

OWN_SENDING = Sending(form="file")
"""How an image is sent to a victim of this project."""

OWN_ANSWER = Answer(scores="probabilities", mask="mask", label="label", labels="labels")
"""Where things are in what it answers."""


class ImageWire:
    """An endpoint that takes an image and answers JSON.

    Args:
        sending: how an image is sent.
        answer: where things are in the JSON.
        labels: names of the classes in the order of the scores, where the answers have none; None: unknown.
    """

    largest: int | None = 1

    def __init__(self, sending: Sending, answer: Answer, labels: tuple[str, ...] | None) -> None:
        self._sending, self._answer, self._labels = sending, answer, labels

    def encode(self, images: npt.NDArray[np.float32]) -> Encoded:
        """The only image (1,C,H,W)."""
        return encode_upload(images[0], self._sending)

    def read(self, response: httpx.Response, asked: tuple[int, ...]) -> Scored:
        """What the answer has: scores, a mask or a label."""
        return read_response(response.content, self._answer, self._labels, size=(asked[2], asked[3]))

    def encode_question(self, image: npt.NDArray[np.float32]) -> Encoded:
        """The same request as for its scores."""
        return encode_upload(image, self._sending)

    def read_description(self, response: httpx.Response, asked: tuple[int, ...]) -> dict[str, object]:
        """The answer in this project's form; classes that nobody names are numbered."""
        return described(self.read(response, (1, *asked)))


class OwnImageWire(ImageWire):
    """A victim, or a gateway, of this project that is asked as people ask it."""

    def __init__(self) -> None:
        super().__init__(OWN_SENDING, OWN_ANSWER, labels=None)

    def read_description(self, response: httpx.Response, asked: tuple[int, ...]) -> dict[str, object]:
        """The JSON, as it is."""
        return own_description(response)


def encode_upload(image: npt.NDArray[np.floating], sending: Sending = OWN_SENDING) -> Encoded:
    """An image (C,H,W) in [0,1], C 1 or 3, as an 8-bit PNG in the body that the victim wants."""
    png = encode_png(image)
    if sending.form is not None:
        return _form(png, sending.form)
    if sending.body is not None:
        return png, {"Content-Type": sending.body}
    filled = sending.filled(base64.b64encode(png).decode())
    return json.dumps(filled).encode(), {"Content-Type": "application/json"}


def _form(png: bytes, field: str) -> Encoded:
    boundary = secrets.token_hex(16)  # 128 random bits do not occur in the PNG
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="{field}"; filename="image.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = b"".join((head.encode(), png, f"\r\n--{boundary}--\r\n".encode()))
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
