"""Folders of labelled images, decoded: one folder a class, or images with masks beside them. PNG and JPEG."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.protocol.errors import ServiceError
from services.protocol.images import decode_sized
from training.command.errors import UserError
from training.data.config import Task
from training.data.duplicates import thumbnails
from training.data.lesions import small_lesions

TESTING: Final = "Testing"
"""The folder of a published test set."""

LESION_LABELS: Final = ("background", "polyp")
"""The classes of a folder of masks."""

_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_IMAGES: Final = "images"
_MASKS: Final = "masks"
_FIXED_SIDE: Final = 224  # pixels, 7 a box of a thumbnail; what decides about splits must not depend on --size

_log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        classes: Names of the classes, in the order of their numbers.
        images: (N,C,H,W) float32 in [0,1].
        labels: (N,) int64 class of each image, or (N,H,W) of each pixel.
        names: Each image's path below the folder.
        strata: (N,) by which the splits are stratified: the class, or whether the lesion is small.
        held_out: (N,) whether the image belongs to a published test set.
        thumbs: (N,h,w), of `training.data.duplicates.thumbnails`.
        digests: SHA-256 of each image's file; with a mask, of both files.
    """

    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    strata: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    thumbs: Tensor
    digests: tuple[bytes, ...]


def task_of(root: Path, told: Task | None) -> Task:
    """The task of a folder's layout: segmentation if masks are beside the images; `told` is --task.

    Raises UserError if there is no such folder or its layout contradicts --task.
    """
    if not root.is_dir():
        raise UserError(
            f"--data {root}: no such folder; name one with a folder a class, one with {_IMAGES} and {_MASKS}, "
            "or 'phantom'"
        )
    task: Task = "segmentation" if (root / _IMAGES).is_dir() and (root / _MASKS).is_dir() else "classification"
    if told == "segmentation" != task:
        raise UserError(f"--task segmentation: {root} lacks the folders {_IMAGES} and {_MASKS}, one mask an image")
    if told == "classification" != task:
        raise UserError(
            f"--task classification: {root} has the folders {_IMAGES} and {_MASKS}, which is a layout to segment; "
            "leave out --task, or name a folder with a folder a class"
        )
    return task


def read_some(root: Path, task: Task, size: int, channels: int, count: int) -> Tensor:
    """At most `count` images (N,C,S,S), from all over a folder in one of the layouts.

    Raises UserError if the folder has no such layout, or one of these images is unreadable.
    """
    if task == "segmentation":
        paths = [picture for picture, _ in _list_pairs(root)]
    else:
        paths = [file.path for file in _list_classes(root)[0]]
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return torch.stack([_decoded(path, path.read_bytes(), channels, size)[0] for path in chosen])


def read_classes(root: Path, size: int, channels: int) -> Contents:
    """Reads `Training/<class>/*` with or without `Testing/<class>/*`, or one folder a class, as `size` x `size` images.

    Raises UserError if the folder has no such layout or holds an unreadable image.
    """
    files, classes = _list_classes(root)

    def read(file: _File) -> tuple[Tensor, Tensor, bytes]:
        data = file.path.read_bytes()
        image, _ = _decoded(file.path, data, channels, size)
        fixed, _ = _decoded(file.path, data, 1, _FIXED_SIDE)
        return image, thumbnails(fixed[None])[0], hashlib.sha256(data).digest()

    images, thumbs, digests = zip(*_in_threads(read, files), strict=True)
    labels = np.array([file.label for file in files])
    return Contents(
        classes=classes,
        images=torch.stack(images),
        labels=torch.from_numpy(labels),
        names=tuple(file.path.relative_to(root).as_posix() for file in files),
        strata=labels,
        held_out=np.array([file.is_test for file in files]),
        thumbs=torch.stack(thumbs),
        digests=digests,
    )


def read_masks(root: Path, size: int, channels: int) -> Contents:
    """Reads `images/*` with `masks/*` of the same stems, as in Kvasir-SEG, at `size` x `size`.

    A pixel belongs to the lesion where the resized mask is more than half white. A threshold before the resizing would
    move the outline by up to a pixel, and keep JPEG artifacts around it.

    Raises:
        UserError: An image or a mask has no partner, two share one, one is unreadable, or they differ in size.
    """
    pairs = _list_pairs(root)

    def read(pair: tuple[Path, Path]) -> tuple[Tensor, Tensor, Tensor, Tensor, bytes]:
        path, mask_path = pair
        data, mask_data = path.read_bytes(), mask_path.read_bytes()
        image, own_size = _decoded(path, data, channels, size)
        mask, mask_size = _decoded(mask_path, mask_data, 1, size)
        if own_size != mask_size:
            raise UserError(
                f"{mask_path}: the mask has {mask_size[1]} x {mask_size[0]} pixels, its image {own_size[1]} x "
                f"{own_size[0]}; replace or remove both files"
            )
        fixed, _ = _decoded(path, data, 1, _FIXED_SIDE)
        fixed_mask, _ = _decoded(mask_path, mask_data, 1, _FIXED_SIDE)
        small = small_lesions(_binary(fixed_mask))[0]
        return image, _binary(mask)[0], small, thumbnails(fixed[None])[0], hashlib.sha256(data + mask_data).digest()

    images, masks, small, thumbs, digests = zip(*_in_threads(read, pairs), strict=True)
    return Contents(
        classes=LESION_LABELS,
        images=torch.stack(images),
        labels=torch.stack(masks),
        names=tuple(image.relative_to(root).as_posix() for image, _ in pairs),
        strata=torch.stack(small).numpy().astype(np.int64),
        held_out=np.zeros(len(pairs), dtype=np.bool_),
        thumbs=torch.stack(thumbs),
        digests=digests,
    )


@dataclass(frozen=True)
class _File:
    path: Path
    label: int
    is_test: bool


def _list_classes(root: Path) -> tuple[list[_File], tuple[str, ...]]:
    training, testing = root / "Training", root / TESTING
    if testing.is_dir() and not training.is_dir():
        raise UserError(f"--data {root}: there is a Testing folder but no Training folder beside it")
    source = training if training.is_dir() else root
    labels = tuple(folder.name for folder in _subfolders(source))
    if len(labels) < 2:
        raise UserError(f"--data {root}: {source} has {len(labels)} class folders; at least 2 are needed")
    strangers = sorted({folder.name for folder in _subfolders(testing)} - set(labels)) if testing.is_dir() else []
    if strangers:
        raise UserError(f"--data {root}: Testing has the class '{strangers[0]}', which Training does not have")
    bases = (source, testing) if testing.is_dir() else (source,)
    folders = [(base / label, number) for base in bases for number, label in enumerate(labels)]
    found = _pictures(root, [folder for folder, _ in folders], "class folders")
    files = [
        _File(path, number, testing in folder.parents)
        for (folder, number), paths in zip(folders, found, strict=True)
        for path in paths
    ]
    return files, labels


def _list_pairs(root: Path) -> list[tuple[Path, Path]]:
    images, masks = (
        _by_stem(paths) for paths in _pictures(root, [root / _IMAGES, root / _MASKS], f"{_IMAGES} and {_MASKS}")
    )
    for stem, image in images.items():
        if stem not in masks:
            raise UserError(f"{image}: there is no mask of this name in {root / _MASKS}; add it, or remove the image")
    for stem, mask in masks.items():
        if stem not in images:
            raise UserError(f"{mask}: there is no image of this name in {root / _IMAGES}; add it, or remove the mask")
    return [(image, masks[stem]) for stem, image in images.items()]


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise UserError(f"{path}: {found[path.stem].name} has the same name but for its ending; remove one of them")
        found[path.stem] = path
    return found


def _pictures(root: Path, folders: Sequence[Path], what: str) -> list[list[Path]]:
    """Finds the PNG and JPEG files of each folder, sorted; raises UserError where there is none."""
    found, ignored = [], 0
    for folder in folders:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in entries if path.suffix.lower() in _SUFFIXES and path.is_file()]
        if not paths:
            raise UserError(f"--data {root}: {folder} holds no PNG or JPEG image")
        ignored += len(entries) - len(paths)
        found.append(paths)
    if ignored:
        _log.info("%s: %d entries of %s are no PNG or JPEG files and are ignored", root, ignored, what)
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _decoded(path: Path, data: bytes, channels: int, side: int) -> tuple[Tensor, tuple[int, int]]:
    """An image (C,side,side) float32, and its own height and width."""
    try:
        image, own_size = decode_sized(data, channels=channels, size=(side, side))
    except ServiceError as error:
        raise UserError(f"{path}: {error}; replace or remove this file") from error
    return torch.from_numpy(image), own_size


def _binary(mask: Tensor) -> Tensor:
    """A mask (1,H,W) in [0,1] to classes (1,H,W): 1 where it is more than half white."""
    return (mask > 0.5).long()


def _in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the interpreter's lock
        return list(pool.map(function, items))
