from typing import Any

import numpy as np
import pytest

from services.protocol import oip
from services.protocol.errors import UpstreamInvalid
from services.protocol.scores import read_scores

ASKED = (2, 3, 4, 6)
"""The shape of the images: no two sides alike."""


def read(array: np.ndarray, *, binary: bool = True) -> np.ndarray:
    outputs = [(oip.Tensor("probabilities", array), binary)]
    body, headers = oip.encode_response(outputs, model_name="m", model_version="1")
    return read_scores(body, headers.get(oip.HEADER), ASKED)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (2, 2, 4, 6), (2, 7, 4, 6)])
@pytest.mark.parametrize("binary", [True, False])
def test_scores_of_images_and_of_pixels_are_left_as_they_are(shape: tuple[int, ...], binary: bool) -> None:
    sent = random(*shape) * 40 - 20  # logits of several classes are scores
    scores = read(sent, binary=binary)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, sent)
    assert np.array_equal(read(sent.astype(np.float64)), sent)


def test_one_plane_of_probabilities_is_completed_by_the_background() -> None:
    plane = random(2, 1, 4, 6)
    plane[0, 0, 0, :2] = 0, 1
    scores = read(plane)
    assert scores.shape == (2, 2, 4, 6)
    assert scores.dtype == np.float32
    assert np.array_equal(scores[:, 1:], plane)
    assert np.array_equal(scores[:, :1], 1 - plane)


@pytest.mark.parametrize("value", [-0.25, 1.5, 30])
def test_one_plane_of_logits_is_not_guessed_at(value: float) -> None:
    plane = np.full((2, 1, 4, 6), 0.5, np.float32)
    plane[1, 0, 3, 5] = value
    with pytest.raises(UpstreamInvalid, match=rf"{value}.*\[0,1\]"):
        read(plane)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (random(2, 2, 6, 4), r"height and width \(4, 6\) with scores of shape \(2, 2, 6, 4\)"),
        (random(2, 2, 2, 3), "score every pixel"),
        (random(2, 1, 8, 12), "score every pixel"),
        (random(2, 0, 4, 6), r"2 images with scores of shape \(2, 0, 4, 6\)"),
        (random(1, 2, 4, 6), r"2 images with scores of shape \(1, 2, 4, 6\)"),
        (random(2, 4, 6), r"scores of shape \(2, 4, 6\)"),
        (random(2, 2, 1, 4, 6), r"scores of shape \(2, 2, 1, 4, 6\)"),
        (np.float32(np.nan) * random(2, 2, 4, 6), "not finite"),
        (np.float32(np.nan) * random(2, 1, 4, 6), "not finite"),
        (1e300 * random(2, 2, 4, 6).astype(np.float64), "not finite"),
    ],
)
def test_what_is_no_score_for_each_image_or_pixel_is_refused_in_words(array: Any, message: str) -> None:
    with pytest.raises(UpstreamInvalid, match=message):
        read(array)
