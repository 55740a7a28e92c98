import pytest
import torch
from torch import Tensor

from training.data import augmentation
from training.data.augmentation import augment, augment_frames
from training.data.phantoms import brain_phantoms, polyp_phantoms


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def frames() -> tuple[Tensor, Tensor]:
    images, masks = polyp_phantoms(24, size=48)
    return images, masks.squeeze(1).long()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No changes to frames but the symmetries of the square."""
    for name in ("ANGLE", "SCALE", "SHIFT", "CONTRAST", "BRIGHTNESS", "TINT"):
        monkeypatch.setattr(augmentation, f"_FRAME_{name}", 0.0)
    return monkeypatch


def test_augmentation_varies_each_image_within_range_and_follows_the_seed() -> None:
    images = brain_phantoms(1, size=32)[0].expand(8, -1, -1, -1)
    moved, again = (augment(images, seeded(1)) for _ in range(2))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, again)
    assert torch.pdist(moved.flatten(1)).min() > 0.1


def test_augmentation_keeps_the_picture_in_the_frame() -> None:
    images = brain_phantoms(48, size=32)[0]
    assert augment(images, seeded()).mean().item() == pytest.approx(images.mean().item(), rel=0.15)


def test_frames_vary_within_range_and_follow_the_seed(frames: tuple[Tensor, Tensor]) -> None:
    images, masks = (part[:1].expand(8, *part.shape[1:]) for part in frames)
    (moved, moved_masks), (again, again_masks) = (augment_frames(images, masks, seeded(1)) for _ in range(2))
    assert moved.shape == images.shape
    assert moved_masks.shape == masks.shape
    assert moved_masks.dtype == torch.int64
    assert set(moved_masks.unique().tolist()) <= {0, 1}
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, again)
    assert torch.equal(moved_masks, again_masks)
    assert torch.pdist(moved.flatten(1)).min() > 0.1


def test_masks_take_the_pose_of_their_frames(frames: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTRAST", "BRIGHTNESS", "TINT"):
        monkeypatch.setattr(augmentation, f"_FRAME_{name}", 0.0)
    masks = 2 * frames[1]  # of a class that is not the first one
    painted = frames[1].unsqueeze(1).float()
    moved, moved_masks = augment_frames(painted, masks, seeded())
    assert ((moved[:, 0] > 0.5) == (moved_masks == 2)).float().mean() > 0.98
    assert (moved_masks != masks).float().mean() > 0.05  # they have moved


def test_frames_are_turned_and_mirrored_in_all_eight_ways(still: pytest.MonkeyPatch) -> None:
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    ways = [torch.rot90(side, turns, (2, 3)) for side in (image, image.flip(3)) for turns in range(4)]
    moved, _ = augment_frames(image.expand(200, -1, -1, -1), torch.zeros(200, 16, 16, dtype=torch.int64), seeded())
    distances = torch.cdist(moved.flatten(1), torch.cat(ways).flatten(1))
    assert distances.min(1).values.max() < 0.05  # as exact as cdist is; two ways are some 11 apart
    assert torch.bincount(distances.argmin(1), minlength=8).min() > 10


@pytest.mark.parametrize("name", ["CONTRAST", "BRIGHTNESS", "TINT"])
def test_light_varies_without_moving_anything(still: pytest.MonkeyPatch, name: str) -> None:
    still.setattr(augmentation, f"_FRAME_{name}", 0.2)
    picture = torch.full((1, 3, 8, 8), 0.5)
    picture[:, :, :4] = 0.4
    lit, _ = augment_frames(picture.expand(30, -1, -1, -1), torch.zeros(30, 8, 8, dtype=torch.int64), seeded())
    levels = lit.flatten(2)
    spread, brightness = levels.amax(2) - levels.amin(2), levels.mean(2)
    assert (spread.std() > 0.005) or name != "CONTRAST"
    assert (brightness.std() > 0.02) == (name != "CONTRAST")
    assert (brightness.std(1).max() > 0.02) == (name == "TINT")
