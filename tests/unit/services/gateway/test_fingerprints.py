"""Fingerprints, and the groups that a client's images form."""

import numpy as np
import pytest

from services.gateway import fingerprints as module
from services.gateway.fingerprints import SIDE, History, digests, fingerprints


def picture(seed: int, shape: tuple[int, int, int] = (1, 64, 64)) -> np.ndarray:
    """An image whose coarse structure is its own."""
    coarse = np.random.default_rng(seed).random((shape[0], 8, 8), np.float32)
    return coarse.repeat(shape[1] // 8, axis=1).repeat(shape[2] // 8, axis=2)


def meet(history: History, image: np.ndarray, now: float = 0.0) -> module.Meeting:
    return history.meet(fingerprints(image[None])[0], digests(image[None])[0], now)


def variants(image: np.ndarray, count: int, amount: float = 4 / 255) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [np.clip(image + amount * rng.choice([-1, 1], image.shape), 0, 1).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 17, 40), (3, 5, 5), (1, 1, 300)])
def test_a_fingerprint_is_a_small_grey_image_of_any_image(shape: tuple[int, int, int]) -> None:
    level = fingerprints(np.full((2, *shape), 0.25, np.float32))
    assert level.shape == (2, SIDE * SIDE)
    assert np.allclose(level, 0.25)


def test_it_is_the_mean_of_what_each_pixel_covers() -> None:
    image = np.random.default_rng(0).random((2, 3, 32, 64), np.float32)
    means = image.mean(axis=1).reshape(2, SIDE, 2, SIDE, 4).mean(axis=(2, 4))
    assert np.allclose(fingerprints(image), means.reshape(2, -1), atol=1e-6)


def test_what_no_image_has_is_clipped_and_views_of_a_body_are_read() -> None:
    wild = np.frombuffer(np.full((1, 1, 16, 16), 7.0, np.float32).tobytes(), np.float32).reshape(1, 1, 16, 16)
    assert np.array_equal(fingerprints(wild), np.ones((1, SIDE * SIDE), np.float32))


def test_different_images_near_one_another_are_counted_and_others_are_not() -> None:
    history = History(0.04, 100.0)
    image = picture(0)
    assert [meet(history, one).near for one in variants(image, 5)] == [1, 2, 3, 4, 5]
    assert [meet(history, picture(seed)).near for seed in range(1, 6)] == [1] * 5
    assert meet(history, image).near == 6


def test_the_same_image_again_is_not_counted() -> None:
    history = History(0.04, 100.0)
    first = meet(history, picture(0))
    again = meet(history, picture(0))
    assert (first.near, first.is_new) == (1, True)
    assert (again.near, again.is_new) == (1, False)


def test_the_radius_is_the_root_mean_square_of_the_difference() -> None:
    history = History(0.04, 100.0)
    meet(history, np.full((1, 32, 32), 100 / 255, np.float32))
    assert meet(history, np.full((1, 32, 32), 110 / 255, np.float32)).near == 2
    assert meet(history, np.full((1, 32, 32), 111 / 255, np.float32)).near == 1


def test_a_count_begins_anew_when_its_window_ends() -> None:
    history = History(0.04, 100.0)
    image, *others = variants(picture(0), 4)
    assert meet(history, image, 50.0).ends_in_s == 100.0
    assert meet(history, others[0], 149.0).near == 2
    assert meet(history, others[1], 149.0).ends_in_s == 1.0
    assert meet(history, others[2], 150.0).near == 1


def test_memory_is_bounded_and_the_group_not_met_for_longest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUPS", 3)
    history = History(0.04, 1000.0)
    kept, lost = variants(picture(0), 3), variants(picture(1), 3)
    for now, image in enumerate([kept[0], lost[0], picture(2), kept[1], picture(3)]):
        meet(history, image, float(now))
    assert meet(history, kept[2], 5.0).near == 3
    assert meet(history, lost[1], 6.0).near == 1


def test_a_group_that_gives_way_leaves_no_count_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUPS", 1)
    history = History(0.04, float("inf"))
    for image in variants(picture(0), 5):
        meet(history, image)
    assert meet(history, picture(1)).near == 1


def test_repeats_are_known_among_the_last_few_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEATS", 2)
    history = History(0.04, 100.0)
    one, two, three = variants(picture(0), 3)
    assert [meet(history, image).is_new for image in (one, two, one, three, one)] == [True, True, False, True, True]
