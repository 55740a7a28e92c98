import numpy as np
import numpy.typing as npt
import pytest

from training.data.splitting import DROPPED, TEST, TRAIN, VALIDATION, assign_splits


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
