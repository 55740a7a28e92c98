"""Labelled images, read from folders or made up, in splits that no near-duplicate crosses.

Layouts: `Training/<class>/*` with `Testing/<class>/*`, or one folder a class; PNG and JPEG. `phantom` names the
procedural set of `training.phantoms`.

How the splits are made, by groups of near-duplicates (`training.duplicates`; lists beside the images are not read):

- Groups go 70 : 10 : 20 to training, validation and test, class by class. A `Testing` folder is pooled with the rest.
- With `published_test`, a `Testing` folder is the test split, all of it; training images whose group touches it are
  dropped, and validation is a tenth of the others. On the brain tumour MRI set that leaves a test set of other sources
  than the training images (whole sources are near-duplicates of its test images, and go), so it is not the default.
- A group whose images disagree about the label is dropped, because one of the labels is wrong and nobody knows which;
  only with `published_test` does `Testing` keep its images and labels as they were published.
"""

import argparse
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.protocol.errors import ServiceError
from services.protocol.images import decode_image
from training.cli import UserError
from training.duplicates import duplicate_groups, thumbnails
from training.phantoms import BRAIN_LABELS, brain_phantoms

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, -1
PHANTOM: Final = "phantom"
"""What --data says for the procedural set."""

_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_THUMBNAIL_SOURCE: Final = 224  # pixels a side, 7 a box; thumbnails must not depend on --size
_PHANTOM_COUNTS: Final = (1600, 200, 400)
_VALIDATION_SHARE: Final = 0.1
_TEST_SHARE: Final = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: (N,C,H,W) float32 in [0,1].
        labels: (N,) int64.
        names: Where each image came from.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.names)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64] | Tensor) -> "ImageSet":
        """Returns the images at these positions, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[chosen], self.labels[chosen], tuple(self.names[i] for i in chosen.tolist()))


@dataclass(frozen=True)
class Splits:
    """A data set, ready for training.

    Attributes:
        name: The folder's name, or "phantom".
        labels: Class names, in the order of the label numbers.
        train: What is learned from.
        validation: What models are selected by.
        test: What is reported.
        fingerprint: SHA-256 of the content (every file's name and bytes; of a phantom set, its pixels) and of which
            image is in which split.
    """

    name: str
    labels: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    fingerprint: str


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    label: int
    is_test: bool


def load_data(arguments: argparse.Namespace) -> Splits:
    """`load_splits` of what `training.cli.add_data_arguments` parsed; a process that asks again gets the same ones."""
    return _loaded(
        arguments.data,
        size=arguments.size,
        channels=arguments.channels,
        seed=arguments.split_seed,
        published_test=arguments.published_test,
    )


def load_splits(data: str, *, size: int = 64, channels: int = 1, seed: int = 0, published_test: bool = False) -> Splits:
    """Loads a data set in splits that are free of leaks.

    Args:
        data: A folder in one of the layouts above, or "phantom".
        size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB.
        seed: Which groups go where, and which phantoms are drawn.
        published_test: Keep the `Testing` folder as the test split.

    Returns:
        The splits; the same arguments and content always give the same ones.

    Raises:
        UserError: The folder is missing, has no such layout, holds an unreadable image, or too few images of a class.
    """
    if data == PHANTOM:
        return _phantom_splits(size, channels, seed)
    root = Path(data)
    if published_test and not (root / "Testing").is_dir():
        raise UserError(f"--published-test needs a Testing folder, and {root} has none")
    files, labels = _list_files(root)
    images, thumbs, digests = _read_files(files, size, channels)
    groups = duplicate_groups(thumbs)
    targets = np.array([file.label for file in files])
    held_out = np.array([file.is_test for file in files]) if published_test else None
    assignment = assign_splits(groups, targets, held_out, seed)
    whole = ImageSet(images, torch.from_numpy(targets), tuple(file.name for file in files))
    train, validation, test = (whole.subset(np.flatnonzero(assignment == split)) for split in (TRAIN, VALIDATION, TEST))
    for part, title in ((train, "training"), (validation, "validation"), (test, "test")):
        for number in range(len(labels)):
            if not (part.labels == number).any():
                raise UserError(
                    f"{root}: no image of class '{labels[number]}' is left for the {title} split once near-duplicates "
                    "are kept together; add distinct images of it"
                )
    _log.info(
        "%s: %d images in %d groups of near-duplicates; %d training, %d validation, %d test, %d dropped as "
        "duplicates of test images or for disagreeing labels",
        dataset_name(data),
        len(files),
        groups.max() + 1,
        len(train),
        len(validation),
        len(test),
        int((assignment == DROPPED).sum()),
    )
    return Splits(dataset_name(data), labels, train, validation, test, _fingerprint(files, digests, assignment))


_loaded = lru_cache(maxsize=1)(load_splits)  # decoding thousands of files takes half a minute


def dataset_name(data: str) -> str:
    """The name under which results of `--data data` go: the folder's own."""
    return data if data == PHANTOM else Path(data).resolve().name


def assign_splits(
    groups: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.bool_] | None,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Decides which image goes to which split, by whole groups.

    Args:
        groups: (N,) near-duplicate group of each image.
        labels: (N,) label of each image.
        held_out: (N,) True where an image belongs to a published test set; None without one.
        seed: Which groups go where.

    Returns:
        (N,) TRAIN, VALIDATION, TEST or DROPPED.
    """
    rng = np.random.default_rng(seed)
    result = np.full(len(groups), TRAIN, dtype=np.int64)
    some_label = np.empty(groups.max() + 1, dtype=np.int64)
    some_label[groups] = labels
    disputed = groups[labels != some_label[groups]]
    result[np.isin(groups, disputed)] = DROPPED
    if held_out is not None:
        result[np.isin(groups, groups[held_out])] = DROPPED
        result[held_out] = TEST
    for label in np.unique(labels):
        members = np.flatnonzero((labels == label) & (result == TRAIN))
        if held_out is None:
            _move(result, groups, members, TEST, _TEST_SHARE * len(members), rng)
        _move(result, groups, members[result[members] == TRAIN], VALIDATION, _VALIDATION_SHARE * len(members), rng)
    return result


def _move(
    result: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    split: int,
    wanted: float,
    rng: np.random.Generator,
) -> None:
    """Moves random whole groups of `members` to `split` until about `wanted` images are there, at least one group."""
    numbers, sizes = np.unique(groups[members], return_counts=True)
    if len(numbers) < 2:
        return  # moving the only group would empty the split that it comes from
    room = max(round(wanted), int(sizes.min()))
    chosen = []
    for position in rng.permutation(len(numbers)):
        if sizes[position] <= room:
            chosen.append(numbers[position])
            room -= int(sizes[position])
    result[members[np.isin(groups[members], chosen)]] = split


def _list_files(root: Path) -> tuple[list[_File], tuple[str, ...]]:
    """Finds the images of a folder and its class names."""
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder; name one with a folder a class, or 'phantom'")
    training, testing = root / "Training", root / "Testing"
    if testing.is_dir() and not training.is_dir():
        raise UserError(f"--data {root}: there is a Testing folder but no Training folder beside it")
    source = training if training.is_dir() else root
    labels = tuple(folder.name for folder in _subfolders(source))
    if len(labels) < 2:
        raise UserError(f"--data {root}: {source} has {len(labels)} class folders; at least 2 are needed")
    strangers = sorted({folder.name for folder in _subfolders(testing)} - set(labels)) if testing.is_dir() else []
    if strangers:
        raise UserError(f"--data {root}: Testing has the class '{strangers[0]}', which Training does not have")
    files: list[_File] = []
    ignored = 0
    for base in (source, testing) if testing.is_dir() else (source,):
        for number, label in enumerate(labels):
            folder = base / label
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            paths = [path for path in entries if path.suffix.lower() in _SUFFIXES and path.is_file()]
            if not paths:
                raise UserError(f"--data {root}: {folder} holds no PNG or JPEG image")
            ignored += len(entries) - len(paths)
            files += [_File(path, path.relative_to(root).as_posix(), number, base == testing) for path in paths]
    if ignored:
        _log.info("%s: %d entries of class folders are no PNG or JPEG files and are ignored", root, ignored)
    return files, labels


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_files(files: Sequence[_File], size: int, channels: int) -> tuple[Tensor, Tensor, list[bytes]]:
    """Decodes files to images (N,C,H,W), thumbnails (N,h,w) and digests of their bytes."""

    def read(file: _File) -> tuple[Tensor, Tensor, bytes]:
        data = file.path.read_bytes()
        try:
            image = torch.from_numpy(decode_image(data, channels=channels, size=(size, size)))
            large = torch.from_numpy(decode_image(data, channels=1, size=(_THUMBNAIL_SOURCE, _THUMBNAIL_SOURCE)))
        except ServiceError as error:
            raise UserError(f"{file.path}: {error}; replace or remove this file") from error
        return image, thumbnails(large[None])[0], hashlib.sha256(data).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the interpreter's lock
        images, thumbs, digests = zip(*pool.map(read, files), strict=True)
    return torch.stack(images), torch.stack(thumbs), list(digests)


def _fingerprint(files: Sequence[_File], digests: Sequence[bytes], assignment: npt.NDArray[np.int64]) -> str:
    names = (file.name for file in files)
    whole = hashlib.sha256()
    for name, digest, split in sorted(zip(names, digests, assignment.tolist(), strict=True)):
        whole.update(f"{name}\0{digest.hex()}\0{split}\n".encode())
    return whole.hexdigest()


def _phantom_splits(size: int, channels: int, seed: int) -> Splits:
    images, labels = brain_phantoms(sum(_PHANTOM_COUNTS), size=size, seed=seed)
    images = images.expand(-1, channels, -1, -1).contiguous()
    names = tuple(f"phantom-{seed}-{index:05d}" for index in range(len(labels)))
    whole = ImageSet(images, labels, names)
    ends = np.cumsum(_PHANTOM_COUNTS)
    train, validation, test = (
        whole.subset(np.arange(end - count, end)) for end, count in zip(ends, _PHANTOM_COUNTS, strict=True)
    )
    fingerprint = hashlib.sha256((images * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()
    return Splits(PHANTOM, BRAIN_LABELS, train, validation, test, fingerprint)
