import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.command.errors import UserError
from training.data.folders import read_masks, task_of


def write(path: Path, pixels: np.ndarray, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels.astype(np.uint8)).save(path, exif=exif, **({"quality": 60} if path.suffix == ".jpg" else {}))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Three frames of 80 x 48 pixels; the mask is white in the left 30 columns."""
    mask = np.zeros((48, 80))
    mask[:, :30] = 255
    for index in range(3):
        write(tmp_path / "images" / f"{index}.jpg", np.random.default_rng(index).integers(0, 256, (48, 80, 3)))
        write(tmp_path / "masks" / f"{index}.jpg", mask)
    return tmp_path


def test_the_outline_of_a_jpeg_mask_is_where_half_a_pixel_is_covered(frames: Path) -> None:
    contents = read_masks(frames, 16, 3)
    assert contents.classes == ("background", "polyp")
    assert contents.names == ("images/0.jpg", "images/1.jpg", "images/2.jpg")
    assert contents.images.shape == (3, 3, 16, 16)
    assert contents.labels.shape == (3, 16, 16)
    assert contents.labels[0].float().mean(0).tolist() == [1.0] * 6 + [0.0] * 10  # 5 columns to one
    assert not contents.held_out.any()


def test_a_lesion_that_covers_less_than_half_of_every_pixel_is_lost(frames: Path) -> None:
    mask = np.zeros((48, 80))
    mask[24, ::5] = 255
    write(frames / "masks" / "1.jpg", mask)
    assert read_masks(frames, 16, 3).labels.flatten(1).any(1).tolist() == [True, False, True]


def test_small_lesions_are_a_stratum_whatever_the_size(frames: Path) -> None:
    mask = np.zeros((48, 80))
    mask[10:22, 10:22] = 255
    write(frames / "masks" / "1.jpg", mask)
    write(frames / "masks" / "2.jpg", np.zeros((48, 80)))  # no lesion is not a small one
    for size in (16, 64):
        assert read_masks(frames, size, 3).strata.tolist() == [0, 1, 0]


def test_pairs_may_differ_in_their_endings_and_orientation_tags_are_obeyed(frames: Path) -> None:
    before = read_masks(frames, 16, 3).labels
    turned = np.asarray(Image.open(frames / "masks" / "0.jpg")).T
    (frames / "masks" / "0.jpg").unlink()
    write(frames / "masks" / "0.png", turned, orientation=5)
    assert torch.equal(read_masks(frames, 16, 3).labels, before)


def test_other_entries_are_counted(frames: Path, caplog: pytest.LogCaptureFixture) -> None:
    (frames / "masks" / "notes.txt").write_text("not an image")
    (frames / "groups.csv").write_text("not read")
    with caplog.at_level(logging.INFO):
        read_masks(frames, 16, 3)
    assert "1 entries of images and masks are no PNG or JPEG files" in caplog.text


def no_mask(folder: Path) -> None:
    (folder / "masks" / "1.jpg").unlink()


def no_image(folder: Path) -> None:
    (folder / "images" / "2.jpg").unlink()


def two_masks(folder: Path) -> None:
    write(folder / "masks" / "1.png", np.zeros((48, 80)))


def broken_mask(folder: Path) -> None:
    (folder / "masks" / "1.jpg").write_bytes(b"\xff\xd8\xffbroken")


def turned_mask(folder: Path) -> None:
    write(folder / "masks" / "1.jpg", np.zeros((80, 48)))


def no_masks_at_all(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_mask, r"images/1\.jpg: there is no mask of this name"),
        (no_image, r"masks/2\.jpg: there is no image of this name"),
        (two_masks, r"masks/1\.png: 1\.jpg has the same name"),
        (broken_mask, r"masks/1\.jpg: .*replace or remove"),
        (turned_mask, r"masks/1\.jpg: the mask has 48 x 80 pixels, its image 80 x 48"),
        (no_masks_at_all, r"masks holds no PNG or JPEG image"),
    ],
)
def test_masks_that_do_not_fit_their_images_are_named(frames: Path, spoil, words: str) -> None:
    spoil(frames)
    with pytest.raises(UserError, match=words):
        read_masks(frames, 16, 3)


def test_masks_beside_images_tell_the_task(frames: Path) -> None:
    assert task_of(frames, None) == task_of(frames, "segmentation") == "segmentation"
    assert task_of(frames / "images", None) == "classification"
