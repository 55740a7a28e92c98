"""From the JSON that a victim answers to an image, to scores: of numbers, of a mask, or of a label."""

import base64
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from services.protocol.errors import ServiceError, UpstreamInvalid
from services.protocol.mapping import Answer, split_path
from services.protocol.masks import decode_mask
from services.protocol.scores import checked_scores
from services.protocol.wires.base import Scored, named

_WHOLE = "answer"  # what a path without steps leads to, in messages
_WORDS_LENGTH = 200
_LARGEST = float(np.finfo(np.float32).max)


def read_response(content: bytes, where: Answer, labels: tuple[str, ...] | None, *, size: tuple[int, int]) -> Scored:
    """Reads the JSON answer to one image.

    Scores are taken where there are any, in the order of the labels; else the mask is, or else the label, as one-hot
    vectors, whose classes have to be known.

    Args:
        content: the answer's body.
        where: where things are in it.
        labels: names of the classes in their order, for answers that have none; None: unknown.
        size: (height, width) of the image, which a mask has to have too.

    Raises:
        UpstreamInvalid: It is no such answer; the message says what is missing.
    """
    try:
        answer: JsonValue = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UpstreamInvalid(f"the victim's answer to an image is no JSON: {error}") from error
    reader = _Reader(where, _labels(_at(answer, where.labels), where.labels) or labels)
    if (scores := _at(answer, where.scores)) is not None:
        return reader.scores(scores)
    if (mask := _at(answer, where.mask)) is not None:
        return reader.mask(mask, size)
    if (label := _at(answer, where.label)) is not None:
        return reader.label(label)
    wanted = [path or _WHOLE for path in (where.scores, where.mask, where.label) if path is not None]
    names = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
    if isinstance(answer, dict):
        raise UpstreamInvalid(f"the victim's answer to an image has no {names}, but {_quoted(answer)}")
    raise UpstreamInvalid(f"the victim's answer to an image has no {names}: it is no JSON object")


def _at(document: JsonValue, path: str | None) -> JsonValue:
    """What a path leads to; None: nothing, or null."""
    if path is None:
        return None
    for step in split_path(path):
        if isinstance(document, dict):
            document = document.get(step)
        elif isinstance(document, list) and step.isascii() and step.isdigit() and len(step) < 10:
            document = document[int(step)] if int(step) < len(document) else None
        else:
            return None
    return document


def _labels(labels: JsonValue, path: str | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
        raise UpstreamInvalid(f"the victim's `{path}` are no list of names")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UpstreamInvalid(f"the victim's `{path}` are not two or more different names")
    return tuple(map(str, labels))


def _both_classes(told: JsonValue) -> JsonValue:
    """A lone probability p, of the second class of two, as (1 - p, p); anything else as it is."""
    return [1 - told, told] if isinstance(told, float | int) and type(told) is not bool and 0 <= told <= 1 else told


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))[:_WORDS_LENGTH] or "nothing"


class _Reader:
    """Reads what an answer holds.

    Args:
        where: where it stood, for messages.
        labels: names of the classes; None: unknown.
    """

    def __init__(self, where: Answer, labels: tuple[str, ...] | None) -> None:
        self._where, self._labels = where, labels
        self._scores_path, self._mask_path = where.scores or _WHOLE, where.mask or _WHOLE
        inside = f"in `{where.labels}`" if where.labels is not None else "in its own words"
        self._remedy = f"let it name them all, {inside}, or name them in a mapping file, as `labels`"

    def scores(self, told: JsonValue) -> Scored:
        pairs = self._pairs(told)
        if pairs is not None:
            labels = self._labels or tuple(sorted(pairs))  # sorted, or each answer might bring an order of its own
            if len(labels) < 2 or set(pairs) != set(labels):
                raise UpstreamInvalid(
                    f"the victim's `{self._scores_path}` score {_quoted(pairs)}, the classes are {_quoted(labels)}: "
                    "let it score each class, and two at least"
                )
            return Scored(self._numbers([pairs[label] for label in labels])[None], labels)
        numbers = self._numbers(told if isinstance(told, list) else _both_classes(told))
        if self._labels is not None and len(self._labels) != len(numbers):
            raise UpstreamInvalid(
                f"the victim's answer has {len(numbers)} {self._scores_path} for {len(self._labels)} labels"
            )
        return Scored(numbers[None], self._labels)

    def mask(self, told: JsonValue, size: tuple[int, int]) -> Scored:
        if isinstance(told, list):
            return self._planes(told, size)
        if self._labels is None:
            raise UpstreamInvalid(
                f"the victim's answer to an image is a mask whose classes are unknown: {self._remedy}"
            )
        if not isinstance(told, str):
            raise UpstreamInvalid(f"the victim's `{self._mask_path}` is no PNG in base64")
        try:
            png = base64.b64decode(told, validate=True)
        except ValueError as error:
            raise UpstreamInvalid(f"the victim's `{self._mask_path}` is no base64: {error}") from error
        count = len(self._labels)
        try:
            classes = decode_mask(png, count, size)
        except ServiceError as error:
            raise UpstreamInvalid(f"the victim's `{self._mask_path}` cannot be used: {error.message}") from error
        one_hot = (classes == np.arange(count)[:, None, None]).astype(np.float32)
        return Scored(one_hot[None], self._labels)

    def label(self, told: JsonValue) -> Scored:
        labels = self._labels
        if not isinstance(told, str | int) or isinstance(told, bool):
            raise UpstreamInvalid(f"the victim's `{self._where.label or _WHOLE}` is neither a label nor its number")
        if labels is None:
            raise UpstreamInvalid(
                f"the victim's answer to an image is the label {str(told)[:_WORDS_LENGTH]!r} alone: without "
                f"probabilities its classes have to be known, so {self._remedy}"
            )
        is_told = [told in (label, number) for number, label in enumerate(labels)]
        if not any(is_told):
            raise UpstreamInvalid(f"the victim's label {str(told)[:_WORDS_LENGTH]!r} is none of its `labels`")
        return Scored(np.array([is_told], dtype=np.float32), labels)

    def _pairs(self, told: JsonValue) -> dict[str, JsonValue] | None:
        """Labels and their numbers, where the scores are told in pairs; None: where they are not."""
        if isinstance(told, dict):
            return told
        if not isinstance(told, list) or not told or not all(isinstance(one, dict) for one in told):
            return None
        entries: list[Any] = told
        name, number = self._where.entry_label, self._where.entry_score
        if not all(isinstance(one.get(name), str) and number in one for one in entries):
            raise UpstreamInvalid(f"the victim's `{self._scores_path}` are no objects with {name!r} and {number!r}")
        pairs = {one[name]: one[number] for one in entries}
        if len(pairs) < len(entries):
            raise UpstreamInvalid(f"the victim's `{self._scores_path}` name a label twice")
        return pairs

    def _planes(self, told: list[JsonValue], size: tuple[int, int]) -> Scored:
        """Probabilities of the foreground, (H,W), or scores of all classes, (K,H,W)."""
        try:
            planes = np.array(told)
        except ValueError as error:
            raise UpstreamInvalid(f"the victim's `{self._mask_path}` are lists of different lengths") from error
        if planes.ndim not in (2, 3) or planes.dtype.kind not in "fiu":
            raise UpstreamInvalid(
                f"the victim's `{self._mask_path}` are no lists of numbers (height, width) or (classes, height, width)"
            )
        planes = planes[None, None] if planes.ndim == 2 else planes[None]
        return named(checked_scores(planes, (1, 1, *size)), self._labels)

    def _numbers(self, told: JsonValue) -> npt.NDArray[np.float32]:
        is_list = isinstance(told, list) and all(type(one) in (int, float) for one in told)
        if not is_list or not isinstance(told, list) or not told:
            raise UpstreamInvalid(f"the victim's `{self._scores_path}` are no list of numbers")
        values: list[Any] = told
        if not all(-_LARGEST <= one <= _LARGEST for one in values):  # false for NaN, and any integer can be compared
            raise UpstreamInvalid(f"the victim answered {self._scores_path} that are not finite")
        return np.array(values, dtype=np.float32)
