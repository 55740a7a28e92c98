import pytest
import torch

from training.data.phantoms import BRAIN_LABELS, brain_phantoms, polyp_phantoms


def test_brains_have_shape_range_and_classes_in_turn() -> None:
    images, labels = brain_phantoms(9, size=48)
    assert images.shape == (9, 1, 48, 48)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.tolist() == [index % len(BRAIN_LABELS) for index in range(9)]


def test_brains_come_in_256_levels() -> None:
    levels = brain_phantoms(4)[0] * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_same_seed_gives_same_brains_and_another_seed_others() -> None:
    first, again, other = (brain_phantoms(4, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_brain_does_not_depend_on_how_many_are_drawn() -> None:
    images, labels = brain_phantoms(70, size=32)
    late_images, late_labels = brain_phantoms(3, size=32, first=65)
    assert torch.allclose(images[65:68], late_images, atol=1.5 / 255)
    assert torch.equal(labels[65:68], late_labels)


def test_brains_differ_from_each_other() -> None:
    images = brain_phantoms(16)[0].flatten(1)
    distances = torch.cdist(images, images) + 100 * torch.eye(16)
    assert distances.min() > 1


def test_lesions_are_brighter_than_what_is_there_without_one() -> None:
    images = brain_phantoms(400, size=32)[0].view(100, 4, 32, 32).mean(0)
    base_of_brain = images[:, 22:25, 14:18].mean((1, 2))
    assert base_of_brain[BRAIN_LABELS.index("pituitary")] > base_of_brain[BRAIN_LABELS.index("notumor")] + 0.05


def test_no_brains_are_an_empty_set() -> None:
    images, labels = brain_phantoms(0)
    assert images.shape == (0, 1, 64, 64)
    assert len(labels) == 0


@pytest.mark.parametrize("size", [32, 64])
def test_polyps_have_frames_and_masks_of_one_size(size: int) -> None:
    frames, masks = polyp_phantoms(12, size=size, seed=3)
    assert frames.shape == (12, 3, size, size)
    assert masks.shape == (12, 1, size, size)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_every_polyp_is_in_view_and_leaves_mucosa() -> None:
    share = polyp_phantoms(64)[1].mean((1, 2, 3))
    assert share.min() > 0.005
    assert share.max() < 0.5


def test_same_seed_gives_same_polyps() -> None:
    first, again = polyp_phantoms(3, seed=5), polyp_phantoms(3, seed=5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
