import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.protocol.images import encode_png
from training.cli import UserError
from training.datasets import DROPPED, TEST, TRAIN, VALIDATION, ImageSet, assign_splits, load_splits
from training.duplicates import duplicate_groups, thumbnails
from training.phantoms import brain_phantoms


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


def random_groups(seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, 150, size=400))
    _, groups = np.unique(groups, return_inverse=True)
    return groups, rng.integers(0, 3, size=groups.max() + 1)[groups]


@pytest.mark.parametrize("seed", range(5))
def test_assignment_keeps_groups_whole_and_shares_near_what_is_asked(seed: int) -> None:
    groups, labels = random_groups(seed)
    assignment = assign_splits(groups, labels, None, seed)
    for group in np.unique(groups):
        assert len(set(assignment[groups == group])) == 1
    for label in range(3):
        shares = np.bincount(assignment[labels == label], minlength=3) / (labels == label).sum()
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_obeys_a_published_test_set(seed: int) -> None:
    groups, labels = random_groups(seed)
    held_out = np.random.default_rng(seed).random(len(groups)) < 0.1
    assignment = assign_splits(groups, labels, held_out, seed)
    assert (assignment[held_out] == TEST).all()
    touched = np.isin(groups, groups[held_out]) & ~held_out
    assert (assignment[touched] == DROPPED).all()
    assert set(assignment[~np.isin(groups, groups[held_out])]) == {TRAIN, VALIDATION}


def test_a_testing_folder_is_pooled_with_the_rest_unless_it_is_asked_for(published: Path) -> None:
    train, validation, test = load(published)
    assert (len(train), len(validation), len(test)) == (36, 4, 10)
    assert any(name.startswith("Testing/") for name in train | validation)
    assert any(name.startswith("Training/") for name in test)


def test_a_published_test_set_that_is_not_there_is_missed(plain: Path) -> None:
    with pytest.raises(UserError, match="--published-test needs a Testing folder"):
        load(plain, published_test=True)
