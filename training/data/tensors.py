"""Splits of images that are at hand as a tensor."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits
from training.data.duplicates import duplicate_groups, thumbnails
from training.data.splitting import TEST, TRAIN, VALIDATION, assign_splits


def split_images(images: Tensor, labels: Tensor | None = None, *, name: str = "images", seed: int = 0) -> Splits:
    """Splits images 70 : 10 : 20 into training, validation and test, near-duplicates together.

    Args:
        images: (N,C,H,W) float32 in [0,1], C 1 or 3.
        labels: (N,) int64 classes to stratify by; None: unlabelled, which learning a defense allows.
        name: Of the data, for the artifact.
        seed: Which images go where.

    Raises:
        UserError: The images are invalid, or too few to be split.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.float32:
        raise UserError(f"expected float32 images (N,C,H,W), C 1 or 3; got {images.dtype}, {tuple(images.shape)}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError("expected images in [0,1]")
    classes = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    assignment = assign_splits(duplicate_groups(thumbnails(images)), classes.numpy(), None, seed)
    whole = ImageSet(images, classes, tuple(map(str, range(len(images)))))
    train, validation, test = (whole.subset(np.flatnonzero(assignment == split)) for split in (TRAIN, VALIDATION, TEST))
    if not (len(train) and len(validation) and len(test)):
        raise UserError(f"{len(images)} images are too few, or too alike, to be split: add distinct ones")
    digest = hashlib.sha256(images.numpy().tobytes() + assignment.tobytes()).hexdigest()
    names = tuple(map(str, range(int(classes.max()) + 1)))
    return Splits(name, names, train, validation, test, digest)
