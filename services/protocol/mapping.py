r"""What a victim's URL does not tell: a small file, in TOML or JSON, that says how a victim that others made is asked.

An endpoint that takes an image and answers JSON:

    labels = ["glioma", "meningioma", "no tumor", "pituitary"]   # in the order of the scores; if answers name none
    health = "/healthz"                          # answers 200 when ready; without it, any answer of the host counts

    [headers]
    Authorization = "Bearer ${HOSPITAL_TOKEN}"   # from the environment

    [image]                                      # one of the three; an 8-bit PNG travels
    form = "file"                                # as a file in this field of a multipart form
    body = "image/png"                           # as the whole body, with this media type
    json = { instances = [{ b64 = "{image}" }] } # in base64, in the place of {image}

    [answer]                                     # paths: predictions.0.scores, or /predictions/0/scores (RFC 6901)
    scores = "predictions.0.scores"              # a list of numbers, an object of labels and numbers, ...
    mask = "mask"                                # a PNG in base64, or nested lists of probabilities
    label = "class"                              # a name among the labels, or its number

What of an Open Inference Protocol server its metadata do not tell, or tell wrongly, each if needed:

    [tensor]
    input = "images"
    output = "scores"                            # where the model has several
    datatype = "FP32"                            # FP16, FP32 or FP64
    encoding = "binary"                          # or "json"
    batch = 8                                    # most images a request
"""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from services.protocol.errors import InvalidInput

IMAGE = "{image}"
"""What the image in base64 takes the place of."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_OURS = ("connection", "content-encoding", "content-length", "content-type", "transfer-encoding")


def split_path(path: str) -> tuple[str, ...]:
    """The steps of a path into a JSON document: `a.0.b`, or `/a/0/b` with the escapes of RFC 6901; none in ""."""
    if path.startswith("/"):
        return tuple(step.replace("~1", "/").replace("~0", "~") for step in path[1:].split("/"))
    return tuple(path.split(".")) if path else ()


def _checked_path(path: str) -> str:
    if not path.startswith("/") and "" in split_path(path):
        raise ValueError("a path has names or numbers between its dots; a name with a dot in it needs the form /a.b")
    return path


_Path = Annotated[str, AfterValidator(_checked_path)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, protected_namespaces=())


class TensorOptions(_Part):
    """What is to be known of an Open Inference Protocol server; None: what its metadata say.

    Attributes:
        input: name of the input.
        output: name of the output with the scores.
        datatype: of the input.
        encoding: how tensors travel there.
        batch: most images a request.
    """

    input: str | None = Field(default=None, min_length=1)
    output: str | None = Field(default=None, min_length=1)
    datatype: Literal["FP16", "FP32", "FP64"] | None = None
    encoding: Literal["binary", "json"] | None = None
    batch: int | None = Field(default=None, ge=1)


class Sending(_Part):
    """How an image is sent; exactly one of the three is given.

    Attributes:
        form: field of a multipart form.
        body: media type of the body that the image is.
        template: a JSON value, sent with `{image}` in its texts replaced by the image in base64; `json` in files.
    """

    form: str | None = Field(default=None, pattern=r"^[\w.\[\]-]+$")
    body: str | None = Field(default=None, pattern=r"^[\w.+-]+/[\w.+-]+$")
    template: JsonValue = Field(default=None, alias="json")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(way is not None for way in (self.form, self.body, self.template)) != 1:
            raise ValueError("give exactly one of form, body and json")
        if self.template is not None and self.filled("") == self.template:
            raise ValueError(f"no text in json holds {IMAGE}, the place of the image")
        return self

    def filled(self, image: str) -> JsonValue:
        """The template with the image, in base64, in its place."""
        return _replaced(self.template, image)


class Answer(_Part):
    """Where in an answer things are: paths as `split_path` reads them. Of several that are there the first counts.

    Attributes:
        scores: numbers, as a list in the order of the labels, as an object label -> number, or as a list of objects
            with a label and a number each; or one alone, the probability of the second of two classes.
        mask: of a segmenter: a PNG in base64, or lists of probabilities, (H,W) or (K,H,W).
        label: a label, or its number.
        labels: the names of all classes, in the order of the scores.
        entry_label: the member of those objects that is the label.
        entry_score: the member of those objects that is the number.
    """

    scores: _Path | None = None
    mask: _Path | None = None
    label: _Path | None = None
    labels: _Path | None = None
    entry_label: str = "label"
    entry_score: str = "score"

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.scores is None and self.mask is None and self.label is None:
            raise ValueError("say where the scores, the mask or the label is")
        return self


class Mapping(_Part):
    """What the file says.

    Attributes:
        labels: names of the classes in the order of the scores, for a victim whose answers do not have them.
        headers: sent with every request, their variables replaced.
        health: path that answers 200 when the victim is ready.
        tensor: of a server that takes tensors.
        image: of an endpoint that takes images.
        answer: likewise.
    """

    labels: tuple[str, ...] | None = None
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    health: str | None = Field(default=None, pattern="^/")
    tensor: TensorOptions | None = None
    image: Sending | None = None
    answer: Answer | None = None

    @field_validator("labels")
    @classmethod
    def _names(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError("two or more different names are needed")
        return labels

    @field_validator("headers", mode="before")
    @classmethod
    def _filled(cls, headers: object) -> object:
        """Replaces variables. No message tells a value: it may be a secret."""
        if not isinstance(headers, dict):
            return headers
        return {name: _with_variables(str(name), value) for name, value in headers.items()}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.image is None) != (self.answer is None):
            raise ValueError("[image] and [answer] belong together: how an image is sent, and what comes back")
        if self.image is not None and self.tensor is not None:
            raise ValueError("a victim takes images or tensors: give [image] or [tensor]")
        return self

    def plain_headers(self) -> dict[str, str]:
        """The headers as they are sent; not for any log."""
        return {name: value.get_secret_value() for name, value in self.headers.items()}


def load_mapping(path: Path | None) -> Mapping | None:
    """Reads a mapping file, if there is one, and the environment variables that its headers name.

    Raises:
        InvalidInput: it is missing, or no such file; what is wrong, and never the value of a header.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes()
        told: Any = json.loads(content) if path.suffix == ".json" else tomllib.loads(content.decode())
    except OSError as error:
        raise InvalidInput(f"the mapping {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON, TOML or UTF-8
        kind = "JSON" if path.suffix == ".json" else "TOML (JSON is read from files named *.json)"
        raise InvalidInput(f"the mapping {path} is no {kind}: {error}") from error
    try:
        return Mapping.model_validate(told)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ") for one in error.errors()
        )
        raise InvalidInput(f"the mapping {path} is wrong: {found}") from None


def _replaced(value: JsonValue, image: str) -> JsonValue:
    if isinstance(value, str):
        return value.replace(IMAGE, image)
    if isinstance(value, list):
        return [_replaced(one, image) for one in value]
    if isinstance(value, dict):
        return {name: _replaced(one, image) for name, one in value.items()}
    return value


def _with_variables(name: str, value: object) -> str:
    """A header's value with the environment's variables in it."""
    if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
        raise ValueError(f"{name!r} is no name of a header")
    if name.lower() in _OURS:
        raise ValueError(f"{name} says how images are sent, and is set by what sends them")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    missing = [variable for variable in _VARIABLE.findall(value) if variable not in os.environ]
    if missing:
        raise ValueError(f"{name} needs the environment variable {missing[0]}, which is not set")
    # A file's last newline often comes along with a secret.
    filled = _VARIABLE.sub(lambda found: os.environ[found[1]].strip(), value).strip()
    if not (filled.isascii() and filled.isprintable()):
        raise ValueError(f"{name} has characters that no header may have")
    return filled
