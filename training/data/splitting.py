"""Which image goes to which split: whole groups of near-duplicates, class by class, by a seed."""

from typing import Final

import numpy as np
import numpy.typing as npt

TRAIN, VALIDATION, TEST, DROPPED = 0, 1, 2, -1

_VALIDATION_SHARE: Final = 0.1
_TEST_SHARE: Final = 0.2


def assign_splits(
    groups: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.bool_] | None,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Assigns whole near-duplicate groups to TRAIN, VALIDATION, TEST or DROPPED, by the seed.

    `groups` and `labels` are (N,); `held_out` (N,) tells the images of a published test set, None without one.
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
