import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.protocol import masks
from services.protocol.errors import InvalidInput, TooLarge, Unsupported, UnsupportedMedia
from services.protocol.masks import abstention_level, class_map, decode_mask, encode_mask, nearest

RNG = np.random.default_rng(0)


def probabilities(classes: int, height: int, width: int) -> np.ndarray:
    scores = RNG.random((classes, height, width), dtype=np.float32)
    return scores / scores.sum(axis=0)


def saved(values: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(buffer, format=kind)
    return buffer.getvalue()


def bilinear(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """A plane enlarged by the textbook: weights by distance between pixel centers, edges repeated."""

    def along(count: int, wanted: int) -> np.ndarray:
        centers = (np.arange(wanted) + 0.5) * count / wanted - 0.5
        weights = np.maximum(1 - abs(centers[:, None] - np.arange(count)), 0)
        return weights / weights.sum(axis=1, keepdims=True)

    return along(plane.shape[0], height) @ plane.astype(np.float64) @ along(plane.shape[1], width).T


@pytest.mark.parametrize("classes", [2, 3, 256])
def test_at_their_own_size_the_most_probable_class_is_taken(classes: int) -> None:
    scores = probabilities(classes, 9, 7)
    assert np.array_equal(class_map(scores, (9, 7)), scores.argmax(0))
    assert np.array_equal(class_map(np.log(scores) * 50, (9, 7)), scores.argmax(0)), "logits are scores, too"


def test_of_equal_scores_the_first_counts() -> None:
    assert class_map(np.full((3, 2, 2), 1 / 3, np.float32), (5, 4)).max() == 0


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("size", [(40, 90), (8, 61), (33, 12)])
def test_probabilities_are_resized_first_and_decided_then(classes: int, size: tuple[int, int]) -> None:
    scores = probabilities(classes, 8, 12)
    resized = np.stack([bilinear(plane, *size) for plane in scores])
    first, second = np.sort(resized, axis=0)[[-1, -2]]
    clear = first - second > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(class_map(scores, size)[clear], resized.argmax(0)[clear])
    assert not np.array_equal(
        class_map(scores, size)[clear],
        np.asarray(Image.fromarray(scores.argmax(0).astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST))[
            clear
        ],
    )


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.float32([0, 1, 1]), (60, 20))
    assert class_map(np.stack([1 - stripes, stripes]), (6, 6)).min() == 1
    assert class_map(np.stack([stripes, 1 - stripes]), (6, 6)).max() == 0


@pytest.mark.parametrize("size", [(41, 23), (7, 5), (1, 100), (100, 1)])
def test_tiles_meet_without_a_seam(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    scores = probabilities(3, 12, 10)
    whole = class_map(scores, size)
    monkeypatch.setattr(masks, "_TILE", 6)
    assert np.array_equal(class_map(scores, size), whole)


def test_a_large_mask_takes_hardly_more_memory_than_its_pixels() -> None:
    scores = probabilities(16, 32, 32)
    tracemalloc.start()
    try:
        assert class_map(scores, (4000, 6000)).shape == (4000, 6000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24e6 + 20e6  # one float32 plane of that size alone would be 96e6


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_no_background(value: float) -> None:
    scores = probabilities(2, 4, 4)
    scores[1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        class_map(scores, (8, 8))


def test_the_levels_are_those_of_the_documentation() -> None:
    for count in range(2, 257):
        png = encode_mask(np.arange(count, dtype=np.uint8)[None], count)
        with Image.open(io.BytesIO(png)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (count, 1))
            assert list(image.tobytes()) == [round(255 * k / (count - 1)) for k in range(count)]
    assert decode_mask(encode_mask(np.uint8([[0, 1]]), 2), 2, (1, 2)).tolist() == [[0, 1]]


@pytest.mark.parametrize("count", [2, 3, 7, 256])
def test_what_encode_mask_wrote_comes_back_exactly(count: int) -> None:
    classes = RNG.integers(0, count, (13, 31)).astype(np.uint8)
    decoded = decode_mask(encode_mask(classes, count), count, (13, 31))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, classes)


def test_more_classes_than_a_mask_tells_apart_are_refused() -> None:
    with pytest.raises(Unsupported, match="256 classes apart, not 257"):
        class_map(probabilities(257, 2, 2), (2, 2))
    with pytest.raises(Unsupported, match="not 300"):
        decode_mask(saved(np.zeros((2, 2), np.uint8)), 300, (2, 2))


def test_a_mask_of_one_bit_is_read() -> None:
    assert decode_mask(saved(np.array([[True, False]])), 2, (1, 2)).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (saved(np.zeros((4, 5), np.uint8)), InvalidInput, "the mask has 5 x 4 pixels, the image 4 x 5"),
        (saved(np.zeros((3, 4), np.uint8)), InvalidInput, "the mask has 4 x 3 pixels, the image 4 x 5"),
        (saved(np.zeros((6, 4), np.uint8)), TooLarge, "the mask has 4 x 6 pixels; at most 20"),
        (saved(np.zeros((5, 4, 3), np.uint8)), InvalidInput, "8-bit grey, not in Pillow's mode 'RGB'"),
        (saved(np.zeros((5, 4), np.uint16)), InvalidInput, "8-bit grey"),
        (saved(np.full((5, 4), 1, np.uint8)), InvalidInput, r"the value 1, .* none of the 2 classes"),
        (saved(np.full((5, 4), 128, np.uint8)), InvalidInput, "the value 128"),
        (saved(np.zeros((5, 4), np.uint8), "JPEG"), UnsupportedMedia, "the mask is no PNG"),
        (b"\x89PNG", UnsupportedMedia, "the mask is no PNG"),
        (b"", InvalidInput, "the mask is empty"),
        (encode_mask(RNG.integers(0, 2, (5, 4)).astype(np.uint8), 2)[:-30], InvalidInput, "cannot be decoded"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_in_words(mask: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        decode_mask(mask, 2, (5, 4))
    assert type(caught.value) is kind


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = saved(np.zeros((3000, 3000), np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="3000 x 3000"):
            decode_mask(bomb, 2, (64, 64))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(8, 12), (16, 36), (5, 7), (13, 40), (1, 1)])
def test_nearest_pixels_are_those_in_which_the_centers_lie(size: tuple[int, int]) -> None:
    pixels = np.arange(96).reshape(8, 12)
    copies = nearest(pixels, size)
    assert copies.shape == size
    for row in range(size[0]):
        for column in range(size[1]):
            there = int((row + 0.5) * 8 / size[0]), int((column + 0.5) * 12 / size[1])
            assert copies[row, column] == pixels[there]


@pytest.mark.parametrize(("count", "level"), [(2, 128), (3, 64), (4, 213), (5, 223)])
def test_abstention_is_the_grey_farthest_from_all_classes(count: int, level: int) -> None:
    assert abstention_level(count) == level


def test_abstention_stands_for_no_class_however_many_there_are() -> None:
    for count in range(2, 256):
        assert abstention_level(count) not in np.rint(255 * np.arange(count) / (count - 1))
    with pytest.raises(Unsupported, match="255 classes apart, not 256"):
        abstention_level(256)


def test_a_mask_that_abstains_cannot_be_taken_for_one_that_does_not() -> None:
    classes = np.uint8([[0, 1, 1], [0, 0, 1]])
    abstains = np.array([[True, False, True], [False, False, False]])
    png = encode_mask(classes, 2, abstains=abstains)
    with Image.open(io.BytesIO(png)) as image:
        assert np.asarray(image).tolist() == [[128, 255, 128], [0, 0, 255]]
    with pytest.raises(InvalidInput, match="the value 128, which stands for none of the 2 classes"):
        decode_mask(png, 2, (2, 3))
    assert encode_mask(classes, 2, abstains=abstains & False) == encode_mask(classes, 2)
