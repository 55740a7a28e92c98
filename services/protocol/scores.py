"""What a victim may answer to tensors, and the one form in which everything behind the client meets it.

Scores have their class axis at 1: (N,K) from a classifier, (N,K,H,W) from a segmenter.
"""

import numpy as np
import numpy.typing as npt

from services.protocol import oip
from services.protocol.errors import ServiceError, UpstreamInvalid


def read_scores(
    body: bytes, json_length: str | None, asked: tuple[int, ...], *, output: str | None = None
) -> npt.NDArray[np.float32]:
    """Reads the scores in a victim's answer by the Open Inference Protocol.

    Args:
        body: the answer's body.
        json_length: the header that tells where the JSON ends; None: it is absent.
        asked: shape (N,C,H,W) of the images asked about.
        output: the name of the output that holds them; None: the only one, or else the one that `oip.OUTPUT` names.

    Returns:
        (N,K), or (N,K,H,W) with K at least 2; float32, finite, exactly as the victim sent them but for the one plane.

    Raises:
        UpstreamInvalid: the answer holds no such scores; the message says what it holds.
    """
    return checked_scores(_read_output(body, json_length, output), asked)


def checked_scores(told: npt.NDArray[np.generic], asked: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """What a victim answered to images, as scores; raises UpstreamInvalid if it is not scores.

    Many segmenters answer with one plane, the probability of their only foreground class: p becomes (1 - p, p). Only
    probabilities do: of a value outside [0,1] nobody knows what it is.

    Args:
        told: the victim's numbers.
        asked: shape (N,C,H,W) of the images asked about.

    Returns:
        (N,K), or (N,K,H,W) with K at least 2; float32 and finite.
    """
    shape = told.shape
    count, size = asked[0], asked[2:]
    if told.ndim not in (2, 4) or shape[0] != count or not shape[1]:
        raise UpstreamInvalid(f"the victim answered {count} images with scores of shape {shape}")
    if told.ndim == 4 and shape[2:] != size:
        raise UpstreamInvalid(
            f"the victim answered images of height and width {size} with scores of shape {shape}: "
            "a segmenter has to score every pixel of them"
        )
    with np.errstate(over="ignore"):
        scores = told.astype(np.float32)
    if not np.isfinite(scores).all():
        raise UpstreamInvalid("the victim answered scores that are not finite")
    return _both_classes(scores) if shape[1:] == (1, *size) else scores


def _read_output(body: bytes, json_length: str | None, name: str | None) -> npt.NDArray[np.generic]:
    try:
        outputs = oip.decode_response(body, oip.header_length(json_length), only=name)
    except ServiceError as error:
        raise UpstreamInvalid(f"the victim's answer is malformed: {error.message}") from error
    if name is None:
        name = oip.OUTPUT if len(outputs) > 1 else next(iter(outputs))  # an only output may have any name
    if name not in outputs:
        found = ", ".join(map(repr, outputs)) or "others"
        raise UpstreamInvalid(f"the victim's answer has no output {name!r}, but {found}")
    return outputs[name]


def _both_classes(plane: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Background and foreground (N,2,H,W) of the foreground alone (N,1,H,W)."""
    lowest, highest = float(plane.min()), float(plane.max())
    if lowest < 0 or highest > 1:
        raise UpstreamInvalid(
            f"the victim answered one plane of scores between {lowest:.4g} and {highest:.4g}: one plane has to hold "
            "probabilities, in [0,1]; let it answer those, or one plane for each class"
        )
    return np.concatenate([1 - plane, plane], axis=1)
