import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from services.protocol.images import encode_png
from services.settings import read
from training.command.errors import UserError
from training.data.config import DataConfig
from training.data.datasets import ImageSet, load_data, load_splits, settled
from training.data.duplicates import duplicate_groups, thumbnails
from training.data.lesions import small_lesions
from training.data.phantoms import brain_phantoms


def write_image(path: Path, seed: int, gain: float = 1.0) -> None:
    """Writes a picture that no other seed resembles."""
    pixels = np.random.default_rng(seed).random((1, 32, 32))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(gain * pixels))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """One folder a class, 20 distinct images each."""
    for number, label in enumerate(("dog", "cat")):
        for index in range(20):
            write_image(tmp_path / "pets" / label / f"{index:02d}.png", 100 * number + index)
    return tmp_path / "pets"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Training and Testing folders, 20 and 5 distinct images a class."""
    for number, label in enumerate(("cat", "dog")):
        for index in range(25):
            part = "Training" if index < 20 else "Testing"
            write_image(tmp_path / "pets" / part / label / f"{index:02d}.png", 100 * number + index)
    return tmp_path / "pets"


def load(folder: Path, seed: int = 0, published_test: bool = False) -> tuple[set[str], set[str], set[str]]:
    splits = load_splits(str(folder), size=32, seed=seed, published_test=published_test)
    return set(splits.train.names), set(splits.validation.names), set(splits.test.names)


def test_one_folder_a_class_is_split_seventy_ten_twenty(plain: Path) -> None:
    splits = load_splits(str(plain), size=48, channels=3)
    assert splits.name == "pets"
    assert splits.labels == ("cat", "dog")
    for part, count in ((splits.train, 14), (splits.validation, 2), (splits.test, 4)):
        assert torch.bincount(part.labels).tolist() == [count, count]
        assert part.images.shape == (2 * count, 3, 48, 48)
        assert part.images.dtype == torch.float32
        assert len(part) == 2 * count
        assert all(name.startswith(splits.labels[label]) for name, label in zip(part.names, part.labels, strict=True))


def test_every_image_is_in_one_split(plain: Path) -> None:
    parts = load(plain)
    assert len(set.union(*parts)) == sum(map(len, parts)) == 40


def test_splits_follow_the_seed(plain: Path) -> None:
    assert load(plain, seed=3) == load(plain, seed=3)
    assert load(plain, seed=3) != load(plain, seed=4)


def test_testing_folder_is_the_test_split_whole(published: Path) -> None:
    train, validation, test = load(published, published_test=True)
    assert test == {f"Testing/{label}/{index}.png" for label in ("cat", "dog") for index in range(20, 25)}
    assert len(train) == 36
    assert len(validation) == 4


def test_training_images_that_resemble_a_test_image_are_dropped(published: Path) -> None:
    write_image(published / "Testing" / "cat" / "copy.png", seed=3, gain=0.5)
    write_image(published / "Training" / "cat" / "again.png", seed=3, gain=0.7)
    train, validation, test = load(published, published_test=True)
    assert "Testing/cat/copy.png" in test
    assert not {"Training/cat/03.png", "Training/cat/again.png"} & (train | validation)


def test_near_duplicates_never_cross_a_split(plain: Path) -> None:
    for index in range(0, 20, 2):
        write_image(plain / "cat" / f"copy{index}.png", seed=100 + index, gain=0.6)
    for seed in range(5):
        splits = load_splits(str(plain), size=32, seed=seed)
        parts = (splits.train, splits.validation, splits.test)
        groups = duplicate_groups(thumbnails(torch.cat([part.images for part in parts])))
        origin = np.repeat([0, 1, 2], [len(part) for part in parts])
        for group in np.unique(groups):
            assert len(set(origin[groups == group])) == 1


def test_duplicates_under_different_labels_are_dropped(plain: Path) -> None:
    write_image(plain / "dog" / "wrong.png", seed=107)
    names = set.union(*load(plain))
    assert not {"dog/wrong.png", "cat/07.png"} & names
    assert len(names) == 39


def test_other_files_are_ignored_and_counted(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    (plain / "groups.csv").write_text("not read")
    (plain / "cat" / "notes.txt").write_text("not an image")
    with caplog.at_level(logging.INFO):
        assert len(set.union(*load(plain))) == 40
    assert "1 entries of class folders are no PNG or JPEG files" in caplog.text


def test_an_unreadable_image_is_named(plain: Path) -> None:
    (plain / "cat" / "05.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match=r"cat/05\.png: .*replace or remove"):
        load(plain)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ([], "0 class folders"),
        (["one"], "1 class folders"),
        (["Testing/a", "Testing/b"], "no Training folder"),
        (["Training/a", "Training/b", "Testing/c"], "class 'c', which Training does not have"),
        (["a", "b"], "a holds no PNG or JPEG image"),
    ],
)
def test_folders_of_another_layout_are_refused(tmp_path: Path, folders: list[str], words: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=words):
        load_splits(str(tmp_path))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_splits(str(tmp_path / "nowhere"))


def test_a_class_with_too_few_distinct_images_is_told(plain: Path) -> None:
    for path in (plain / "cat").iterdir():
        write_image(path, seed=999)
    with pytest.raises(UserError, match="no image of class 'cat' is left for the validation split"):
        load(plain)


def test_fingerprint_follows_content_and_splits_only(plain: Path) -> None:
    first = load_splits(str(plain), size=32).fingerprint
    assert load_splits(str(plain), size=48, channels=3).fingerprint == first
    assert load_splits(str(plain), size=32, seed=9).fingerprint != first
    write_image(plain / "cat" / "05.png", seed=999)
    assert load_splits(str(plain), size=32).fingerprint != first


def test_subset_keeps_images_labels_and_names_together() -> None:
    images, labels = brain_phantoms(6, size=32)
    whole = ImageSet(images, labels, tuple("abcdef"))
    part = whole.subset([4, 1])
    assert part.names == ("e", "b")
    assert torch.equal(part.images, images[[4, 1]])
    assert part.labels.tolist() == [0, 1]


def test_phantoms_come_in_three_disjoint_splits() -> None:
    splits = load_splits("phantom", size=32, channels=3)
    assert splits.name == "phantom"
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [1600, 200, 400]
    assert splits.train.images.shape[1:] == (3, 32, 32)
    assert torch.bincount(splits.test.labels).tolist() == [100] * 4
    names = splits.train.names + splits.validation.names + splits.test.names
    assert len(set(names)) == 2200


def test_a_testing_folder_is_pooled_with_the_rest_unless_it_is_asked_for(published: Path) -> None:
    train, validation, test = load(published)
    assert (len(train), len(validation), len(test)) == (36, 4, 10)
    assert any(name.startswith("Testing/") for name in train | validation)
    assert any(name.startswith("Training/") for name in test)


def test_a_published_test_set_that_is_not_there_is_missed(plain: Path) -> None:
    with pytest.raises(UserError, match="--published-test needs a Testing folder"):
        load(plain, published_test=True)


def write_frame(folder: Path, index: int, side: int, gain: float = 1.0) -> None:
    """Writes a picture that no other index resembles, and a mask with a white square of that side."""
    mask = np.zeros((1, 32, 32))
    mask[:, 4 : 4 + side, 8 : 8 + side] = 1
    for name, pixels in (("images", gain * np.random.default_rng(index).random((3, 32, 32))), ("masks", mask)):
        path = folder / name / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))


@pytest.fixture
def lesions(tmp_path: Path) -> Path:
    """Images with masks: 20 small lesions, of 16 of 1024 pixels, and 20 of a quarter of the image."""
    for index in range(40):
        write_frame(tmp_path / "frames", index, side=4 if index % 2 else 16)
    return tmp_path / "frames"


def test_images_with_masks_are_split_to_segment(lesions: Path) -> None:
    splits = load_splits(str(lesions), size=32)
    assert (splits.task, splits.labels) == ("segmentation", ("background", "polyp"))
    for part, count in ((splits.train, 14), (splits.validation, 2), (splits.test, 4)):
        assert part.images.shape == (2 * count, 3, 32, 32)
        assert part.labels.shape == (2 * count, 32, 32)
        assert part.labels.dtype == torch.int64
        assert small_lesions(part.labels).sum() == count
        for name, mask in zip(part.names, part.labels, strict=True):
            assert mask.sum() == (16 if int(Path(name).stem) % 2 else 256)
    assert len({*splits.train.names, *splits.validation.names, *splits.test.names}) == 40


def test_subset_keeps_masks_too(lesions: Path) -> None:
    train = load_splits(str(lesions), size=32).train
    assert torch.equal(train.subset([3, 1]).labels, train.labels[[3, 1]])


def test_a_set_to_segment_has_a_fingerprint_of_images_masks_and_splits(lesions: Path) -> None:
    first = load_splits(str(lesions), size=32).fingerprint
    assert load_splits(str(lesions), size=48, channels=1).fingerprint == first
    assert load_splits(str(lesions), size=32, seed=9).fingerprint != first
    mask = np.zeros((1, 32, 32))
    mask[:, 4:20, 8:25] = 1
    (lesions / "masks" / "00.png").write_bytes(encode_png(mask))
    assert load_splits(str(lesions), size=32).fingerprint != first


def test_copies_with_other_masks_stay_together_and_are_kept(lesions: Path) -> None:
    for index in range(0, 20, 2):  # the same picture, brighter, and its lesion outlined smaller
        write_frame(lesions, index, side=16, gain=0.6)
        for folder in ("images", "masks"):
            (lesions / folder / f"{index:02d}.png").rename(lesions / folder / f"copy{index:02d}.png")
        write_frame(lesions, index, side=4)
    for seed in range(5):
        splits = load_splits(str(lesions), size=32, seed=seed)
        parts = [{Path(name).stem for name in part.names} for part in (splits.train, splits.validation, splits.test)]
        assert sum(map(len, parts)) == 50
        for index in range(0, 20, 2):
            assert [f"{index:02d}" in part for part in parts] == [f"copy{index:02d}" in part for part in parts]


def test_masks_that_mark_nothing_are_told(lesions: Path) -> None:
    for path in (lesions / "masks").iterdir():
        path.write_bytes(encode_png(np.full((1, 32, 32), 1 / 255)))
    with pytest.raises(UserError, match=r"no image of class 'polyp'.*masks are white where the lesion is"):
        load_splits(str(lesions), size=32)


def test_a_task_that_contradicts_the_folder_is_refused(plain: Path, lesions: Path) -> None:
    assert load_splits(str(plain), task="classification", size=32).task == "classification"
    assert load_splits(str(lesions), task="segmentation", size=32).task == "segmentation"
    with pytest.raises(UserError, match=r"--task segmentation: .* lacks the folders images and masks"):
        load_splits(str(plain), task="segmentation")
    with pytest.raises(UserError, match=r"--task classification: .* has the folders images and masks"):
        load_splits(str(lesions), task="classification")
    with pytest.raises(UserError, match="--published-test needs a Testing folder"):
        load_splits(str(lesions), published_test=True)


@pytest.mark.parametrize(("channels", "planes"), [(None, 3), (1, 1)])
def test_phantoms_to_segment_are_polyps_with_masks(channels: int | None, planes: int) -> None:
    splits = load_splits("phantom", task="segmentation", size=32, channels=channels)
    assert (splits.name, splits.task, splits.labels) == ("phantom", "segmentation", ("background", "polyp"))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [600, 100, 200]
    assert splits.test.images.shape == (200, planes, 32, 32)
    assert splits.test.labels.shape == (200, 32, 32)
    assert splits.test.labels.unique().tolist() == [0, 1]
    assert splits.fingerprint != load_splits("phantom", size=32).fingerprint


def test_what_is_left_to_the_data_is_filled_in(plain: Path, lesions: Path) -> None:
    for folder, task, channels in ((plain, "classification", 1), (lesions, "segmentation", 3)):
        config = DataConfig(data=str(folder), size=32)
        splits = load_data(config)
        assert settled(config).task == splits.task == task
        assert settled(config).channels == splits.train.images.shape[1] == channels
        assert load_data(config.model_copy(update={"task": task})) is splits
        other = read(DataConfig, ["--data", str(folder), "--size", "32", "--channels", str(4 - channels)], prog="x")
        assert load_data(other).train.images.shape[1] == 4 - channels


@pytest.mark.realdata
def test_no_known_duplicates_of_the_polyp_set_cross_a_split(real_data: Path) -> None:
    splits = load_splits(str(real_data / "kvasir_seg"), size=32)
    parts = (splits.train, splits.validation, splits.test)
    where = {Path(name).stem: number for number, part in enumerate(parts) for name in part.names}
    with (real_data / "kvasir_seg" / "groups.csv").open(newline="") as file:
        groups = {row["name"]: row["duplicate_group"] for row in csv.DictReader(file)}
    assert where.keys() == groups.keys()
    assert [len(part) / len(groups) for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    shares = [small_lesions(part.labels).float().mean().item() for part in parts]
    assert shares == pytest.approx([0.2, 0.2, 0.2], abs=0.02)
    sizes: dict[str, set[int]] = {}
    for name, group in groups.items():
        sizes.setdefault(group, set()).add(where[name])
    # One of the three listed pairs is no near-duplicate by our measure (see test_duplicates), and may be apart.
    assert sum(len(numbers) > 1 for numbers in sizes.values()) <= 1
