"""Tensors to `POST /predict` of a victim of this project."""

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol import oip
from services.protocol.images import encode_png
from services.protocol.scores import read_scores
from services.protocol.wires.base import Encoded, Scored, described, named, own_description


class PredictWire:
    """Many images a request as float32 tensors in binary, unrounded there and back.

    Args:
        labels: names of the classes; None: the victim is asked for them, with a PNG.
    """

    largest: int | None = None

    def __init__(self, labels: tuple[str, ...] | None) -> None:
        self._labels = labels

    def encode(self, images: npt.NDArray[np.float32]) -> Encoded:
        """All images in one tensor."""
        return oip.encode_request([oip.Tensor(oip.INPUT, images)])

    def read(self, response: httpx.Response, asked: tuple[int, ...]) -> Scored:
        """The scores, exactly as the victim sent them; a single plane of probabilities is completed."""
        scores = read_scores(response.content, response.headers.get(oip.HEADER), asked)
        return named(scores, self._labels)

    def encode_question(self, image: npt.NDArray[np.float32]) -> Encoded:
        """The image as a PNG, which is answered in JSON; as a tensor where there is no need of names."""
        if self._labels is not None:
            return self.encode(image[None])
        return encode_png(image), {"Content-Type": "image/png"}

    def read_description(self, response: httpx.Response, asked: tuple[int, ...]) -> dict[str, object]:
        """The JSON, as it is, or the scores in words."""
        if self._labels is not None:
            return described(self.read(response, (1, *asked)))
        return own_description(response)
