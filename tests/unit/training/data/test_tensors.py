import pytest
import torch

from training.command.errors import UserError
from training.data.tensors import split_images


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_image_is_in_one_split_and_near_duplicates_are_together():
    distinct = images(100)
    splits = split_images(torch.cat([distinct, distinct + 0.001 * (1 - distinct)]))
    parts = [set(part.names) for part in (splits.train, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [140, 20, 40]
    assert len(set.union(*parts)) == 200
    for part in parts:
        assert {str((int(name) + 100) % 200) for name in part} == part


def test_the_seed_decides_and_the_fingerprint_tells():
    first, same, other = (split_images(images(50), seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(first.train.images, same.train.images)


def test_labels_keep_their_proportions():
    labels = torch.arange(100) % 4
    splits = split_images(images(100), labels)
    assert splits.labels == ("0", "1", "2", "3")
    for part, share in ((splits.train, 0.7), (splits.validation, 0.1), (splits.test, 0.2)):
        counts = part.labels.bincount(minlength=4)
        assert ((counts - 25 * share).abs() <= 1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4, 2, 8, 8), "C 1 or 3"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "float32"),
        (torch.full((4, 1, 8, 8), 2.0), r"in \[0,1\]"),
        (torch.full((4, 1, 8, 8), float("nan")), r"in \[0,1\]"),
        (images(1), "too few"),
    ],
)
def test_what_cannot_be_split_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        split_images(wrong)
