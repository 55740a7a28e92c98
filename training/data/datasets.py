"""Labelled images from folders or procedural, in splits that no near-duplicate crosses.

Layouts (PNG and JPEG): `Training/<class>/*` with `Testing/<class>/*`, or one folder a class, to classify; `images/*`
with `masks/*` to segment. `phantom` names the procedural sets of `training.data.phantoms`.

Splits are made by groups of near-duplicates (`training.data.duplicates`):

- Groups go 70 : 10 : 20 to training, validation and test, stratified by class, or by small and other lesions. A
  `Testing` folder is pooled with the rest.
- With `published_test`, the `Testing` folder is the test split; training images whose group touches it are dropped,
  and validation is a tenth of the others. On the brain tumour MRI set whole sources are near-duplicates of test images
  and are dropped, so that the test set has other sources than training: it is not the default.
- A group whose images disagree about the label is dropped, as nobody knows which label is wrong; with
  `published_test`, `Testing` keeps its images and labels as published. Masks are not compared.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.command.errors import UserError
from training.data.config import PHANTOM, DataConfig, Task
from training.data.duplicates import duplicate_groups, grey
from training.data.folders import LESION_LABELS, TESTING, Contents, read_classes, read_masks, task_of
from training.data.phantoms import BRAIN_LABELS, brain_phantoms, polyp_phantoms
from training.data.splitting import DROPPED, TEST, TRAIN, VALIDATION, assign_splits

_CHANNELS: Final[dict[Task, int]] = {"classification": 1, "segmentation": 3}  # where --channels does not say
_PHANTOM_COUNTS: Final[dict[Task, tuple[int, int, int]]] = {
    "classification": (1600, 200, 400),
    "segmentation": (600, 100, 200),
}

D = TypeVar("D", bound=DataConfig)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels.

    Attributes:
        images: (N,C,H,W) float32 in [0,1].
        labels: (N,) int64 classes, or (N,H,W) int64 masks, 0 for the background.
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
        fingerprint: SHA-256 of the content (file names and bytes, masks included; of phantoms, pixels) and of which
            image is in which split.
    """

    name: str
    labels: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    fingerprint: str

    @property
    def task(self) -> Task:
        """Whether images have a class, or a mask."""
        return "classification" if self.test.labels.dim() == 1 else "segmentation"


def settled(config: D) -> D:
    """Fills in --task and --channels where they are left to the data, so that they are recorded.

    Raises UserError if the folder is missing or its layout contradicts --task.
    """
    task = _task(config.data, config.task)
    return config.model_copy(update={"task": task, "channels": config.channels or _CHANNELS[task]})


def load_data(config: DataConfig) -> Splits:
    """The splits of a configuration, cached within the process; raises as `load_splits`."""
    config = settled(config)
    return _loaded(
        config.data,
        task=config.task,
        size=config.size,
        channels=config.channels,
        seed=config.split_seed,
        published_test=config.published_test,
    )


def load_splits(
    data: str,
    *,
    task: Task | None = None,
    size: int = 64,
    channels: int | None = None,
    seed: int = 0,
    published_test: bool = False,
) -> Splits:
    """Loads a data set in leak-free splits; the same arguments and content always give the same ones.

    Args:
        data: A folder in one of the layouts above, or "phantom".
        task: None: by the folder's layout; classification for phantoms.
        size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB; None: 1 to classify, 3 to segment.
        seed: Which groups go where, and which phantoms are drawn.
        published_test: Keep the `Testing` folder as the test split.

    Raises:
        UserError: The folder is missing, has no such layout or another task's, holds an unreadable image, or too few
            images of a class.
    """
    task = _task(data, task)
    channels = channels or _CHANNELS[task]
    if data == PHANTOM:
        return _phantom_splits(task, size, channels, seed)
    root = Path(data)
    if published_test and not (root / TESTING).is_dir():
        raise UserError(f"--published-test needs a Testing folder, and {root} has none")
    read = read_masks if task == "segmentation" else read_classes
    contents = read(root, size, channels)
    groups = duplicate_groups(contents.thumbs)
    strata = contents.strata
    if task == "segmentation":  # near-duplicates may differ in their masks: a group is of its first image's stratum
        strata = strata[np.unique(groups, return_index=True)[1]][groups]
    assignment = assign_splits(groups, strata, contents.held_out if published_test else None, seed)
    whole = ImageSet(contents.images, contents.labels, contents.names)
    train, validation, test = (whole.subset(np.flatnonzero(assignment == split)) for split in (TRAIN, VALIDATION, TEST))
    _log.info(
        "%s: %d images in %d groups of near-duplicates; %d training, %d validation, %d test, %d dropped as "
        "duplicates of test images or for disagreeing labels",
        dataset_name(data),
        len(whole),
        groups.max() + 1,
        len(train),
        len(validation),
        len(test),
        int((assignment == DROPPED).sum()),
    )
    splits = Splits(dataset_name(data), contents.classes, train, validation, test, _fingerprint(contents, assignment))
    _refuse_missing_classes(root, splits)
    return splits


_loaded = lru_cache(maxsize=1)(load_splits)  # decoding thousands of files takes half a minute


def dataset_name(data: str) -> str:
    """The name under which results of `--data data` go: the folder's own."""
    return data if data == PHANTOM else Path(data).resolve().name


def _task(data: str, told: Task | None) -> Task:
    return (told or "classification") if data == PHANTOM else task_of(Path(data), told)


def _refuse_missing_classes(root: Path, splits: Splits) -> None:
    """Raises UserError unless every class is in every split (of masks, in a pixel)."""
    hint = "add distinct images of it"
    if splits.task == "segmentation":
        hint += ", and see that its masks are white where the lesion is and black elsewhere"
    for part, title in ((splits.train, "training"), (splits.validation, "validation"), (splits.test, "test")):
        for number, label in enumerate(splits.labels):
            if not (part.labels == number).any():
                raise UserError(
                    f"{root}: no image of class '{label}' is left for the {title} split once near-duplicates "
                    f"are kept together; {hint}"
                )


def _fingerprint(contents: Contents, assignment: npt.NDArray[np.int64]) -> str:
    whole = hashlib.sha256()
    for name, digest, split in sorted(zip(contents.names, contents.digests, assignment.tolist(), strict=True)):
        whole.update(f"{name}\0{digest.hex()}\0{split}\n".encode())
    return whole.hexdigest()


def _phantom_splits(task: Task, size: int, channels: int, seed: int) -> Splits:
    counts = _PHANTOM_COUNTS[task]
    classes: tuple[str, ...] = LESION_LABELS if task == "segmentation" else BRAIN_LABELS
    if task == "segmentation":
        images, masks = polyp_phantoms(sum(counts), size=size, seed=seed)
        images = grey(images) if channels == 1 else images
        labels = masks.squeeze(1).long()
    else:
        images, labels = brain_phantoms(sum(counts), size=size, seed=seed)
        images = images.expand(-1, channels, -1, -1).contiguous()
    names = tuple(f"phantom-{seed}-{index:05d}" for index in range(len(labels)))
    whole = ImageSet(images, labels, names)
    ends = np.cumsum(counts)
    train, validation, test = (
        whole.subset(np.arange(end - count, end)) for end, count in zip(ends, counts, strict=True)
    )
    digest = hashlib.sha256((images * 255).round().to(torch.uint8).numpy().tobytes())
    if task == "segmentation":
        digest.update(labels.to(torch.uint8).numpy().tobytes())
    return Splits(PHANTOM, classes, train, validation, test, digest.hexdigest())
