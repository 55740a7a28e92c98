"""Tensors to a model of an Open Inference Protocol v2 server: Triton, KServe, TorchServe, OpenVINO, MLServer.

What the model takes and answers is read from its metadata, and held to what this project can send: batches of images
(N,C,H,W) in floating point. Whatever else is found is refused before any image travels, in words that say what to do.
"""

from dataclasses import dataclass
from typing import Any, Self

import httpx
import numpy as np
import numpy.typing as npt

from services.protocol import oip
from services.protocol.datatypes import DTYPES
from services.protocol.errors import InvalidInput, Unsupported, UpstreamInvalid
from services.protocol.mapping import TensorOptions
from services.protocol.scores import read_scores
from services.protocol.wires.base import Encoded, Scored, described, named

BINARY_EXTENSION = "binary_tensor_data"
"""What a server that reads binary tensors names among its extensions."""

_FLOATS = ("FP16", "FP32", "FP64")


@dataclass(frozen=True)
class ServerWire:
    """How one model is asked.

    Attributes:
        model: where its metadata are, for messages.
        name: of its input.
        datatype: of its input.
        shape: (N,C,H,W) of its input, -1 where any size will do; None: unknown.
        output: the output with the scores; None: the only one.
        binary: whether tensors travel in binary; else in JSON.
        largest: most images a request; None: any number.
        labels: names of the classes, which the protocol has no place for; None: unknown.
    """

    model: str
    name: str
    datatype: str
    shape: tuple[int, ...] | None
    output: str | None
    binary: bool
    largest: int | None
    labels: tuple[str, ...] | None

    @classmethod
    def from_metadata(
        cls, url: str, model: object, server: object, options: TensorOptions, labels: tuple[str, ...] | None
    ) -> Self:
        """Reads the metadata.

        Args:
            url: where the model's are, for messages.
            model: the model's, decoded.
            server: the server's, decoded; None: it has none.
            options: what outranks them.
            labels: names of the classes, if known.

        Raises:
            InvalidInput: the options name what the model does not have.
            Unsupported: the model takes something else than batches of images in floating point.
            UpstreamInvalid: these are no metadata.
        """
        entry = _input(_tensors(model, "inputs", url), options.input, url)
        datatype = options.datatype or entry.get("datatype", "FP32")
        if datatype not in _FLOATS:
            raise Unsupported(
                f"the model at {url} takes {datatype} tensors: images are sent as {', '.join(_FLOATS)}; "
                "serve it with an input in floating point, in [0,1]"
            )
        binary = options.encoding == "binary" or (options.encoding is None and _reads_binary(server))
        if datatype == "FP16" and not binary:
            raise Unsupported(
                f"the model at {url} takes FP16 tensors, which JSON cannot carry, and its server does not say that it "
                f'reads binary ones ({BINARY_EXTENSION!r}); if it does all the same, map it with encoding = "binary"'
            )
        shape = _shape(entry, url)
        bounds = [bound for bound in (options.batch, 1 if shape and shape[0] == 1 else None) if bound]
        return cls(
            model=url,
            name=entry["name"],
            datatype=datatype,
            shape=shape,
            output=_output([one["name"] for one in _tensors(model, "outputs", url)], options.output, url),
            binary=binary,
            largest=min(bounds, default=None),
            labels=labels,
        )

    def encode(self, images: npt.NDArray[np.float32]) -> Encoded:
        """All images in one tensor of the model's datatype."""
        self._check(images.shape[1:])
        tensor = oip.Tensor(self.name, images.astype(DTYPES[self.datatype], copy=False))
        return oip.encode_request([tensor], binary=self.binary, binary_output=self.binary, output=self.output)

    def read(self, response: httpx.Response, asked: tuple[int, ...]) -> Scored:
        """The scores, as the model sent them; a single plane of probabilities is completed."""
        length = response.headers.get(oip.HEADER)
        return named(read_scores(response.content, length, asked, output=self.output), self.labels)

    def encode_question(self, image: npt.NDArray[np.float32]) -> Encoded:
        """The request for its scores: the protocol has no other."""
        return self.encode(image[None])

    def read_description(self, response: httpx.Response, asked: tuple[int, ...]) -> dict[str, object]:
        """The scores in words; classes that nobody names are numbered."""
        return described(self.read(response, (1, *asked)))

    def _check(self, image: tuple[int, ...]) -> None:
        """Refuses images (C,H,W) that the model does not take."""
        if self.shape is None or _fits(self.shape[1:], image):
            return
        channels, height, width = image
        if _fits(self.shape[1:], (height, width, channels)):
            raise Unsupported(
                f"the model at {self.model} takes images as {list(self.shape)}, channels last: images are sent as "
                "(N, channels, height, width); serve it with channels first"
            )
        raise InvalidInput(
            f"the model at {self.model} takes images as {list(self.shape)}, these are [N, {channels}, {height}, "
            f"{width}]: bring them to its size and channels (--size, --channels)"
        )


def _tensors(model: object, key: str, url: str) -> list[dict[str, Any]]:
    """The entries of `inputs` or `outputs`, each with a name; none where the server tells none."""
    entries = (model.get(key) or []) if isinstance(model, dict) else None
    if not isinstance(entries, list) or any(
        not isinstance(one, dict) or not isinstance(one.get("name"), str) for one in entries
    ):
        raise UpstreamInvalid(f"{url} answers no metadata of a model: {key!r} is no list of tensors with names")
    return entries


def _input(found: list[dict[str, Any]], wanted: str | None, url: str) -> dict[str, Any]:
    """The only input."""
    if not found:  # models that are code, rather than files, often tell nothing
        return {"name": wanted or oip.INPUT}
    told = ", ".join(f"{one['name']!r} ({one.get('datatype')} {one.get('shape')})" for one in found)
    if len(found) > 1:
        raise Unsupported(
            f"the model at {url} takes {len(found)} inputs, {told}: only images are sent; serve it behind a model "
            "that needs nothing else"
        )
    if wanted not in (None, found[0]["name"]):
        raise InvalidInput(f"the model at {url} has no input {wanted!r}, but {told}")
    return found[0]


def _output(found: list[str], wanted: str | None, url: str) -> str | None:
    """The output to ask for; None: unknown, so that all are."""
    told = ", ".join(map(repr, found))
    if wanted is not None:
        if found and wanted not in found:
            raise InvalidInput(f"the model at {url} has no output {wanted!r}, but {told}")
        return wanted
    if len(found) > 1 and oip.OUTPUT not in found:
        raise InvalidInput(
            f"the model at {url} has the outputs {told}: say in a mapping file which one holds the scores "
            "(--victim-mapping; [tensor] output)"
        )
    return (oip.OUTPUT if len(found) > 1 else found[0]) if found else None


def _shape(entry: dict[str, Any], url: str) -> tuple[int, ...] | None:
    """The input's shape, with 4 axes and a variable or single first one; None where the server does not tell."""
    shape = entry.get("shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or any(type(side) is not int for side in shape):
        raise UpstreamInvalid(f"{url} answers no metadata of a model: {shape!r:.80} is no shape")
    if len(shape) != 4:
        raise Unsupported(
            f"the model at {url} takes tensors of shape {shape}: images are sent as (N, channels, height, width)"
        )
    if shape[0] > 1:
        raise Unsupported(
            f"the model at {url} takes exactly {shape[0]} images a request, {shape}: serve it with a variable batch, "
            "or a batch of 1"
        )
    return tuple(shape)


def _fits(sides: tuple[int, ...], image: tuple[int, ...]) -> bool:
    """Whether the sides, where they are fixed, are the image's."""
    return all(side in (-1, own) for side, own in zip(sides, image, strict=True))


def _reads_binary(server: object) -> bool:
    extensions = server.get("extensions") if isinstance(server, dict) else None
    return isinstance(extensions, list) and BINARY_EXTENSION in extensions
