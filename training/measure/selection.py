"""Which images of a split are measured."""

import random
from collections import defaultdict

from torch import Tensor

from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits
from training.data.lesions import small_lesions


def chosen_images(splits: Splits, split: str, limit: int | None, seed: int) -> tuple[list[int], ImageSet]:
    """The images of --split and --limit: indices in the split, in `stratified_order`, and the images in that order.

    Raises UserError if there are none.
    """
    pool = splits.validation if split == "validation" else splits.test
    if len(pool) == 0:
        raise UserError(f"the {split} split of {splits.name} has no images: choose another --split or --data")
    indices = stratified_order(pool.labels if pool.labels.ndim == 1 else small_lesions(pool.labels).long(), limit, seed)
    return indices, pool.subset(indices)


def stratified_order(labels: Tensor, limit: int | None, seed: int) -> list[int]:
    """At most `limit` indices of labels (N,) int64, in an order whose every prefix is about stratified.

    A smaller limit gives a prefix of a larger one's order, so that work on few images can be continued.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    placed = []
    for label, indices in members.items():
        random.Random(f"{seed}:{label}").shuffle(indices)
        placed += [((rank + 0.5) / len(indices), label, index) for rank, index in enumerate(indices)]
    return [index for *_, index in sorted(placed)[:limit]]
