import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from services.protocol.images import decode_image
from training.data.duplicates import duplicate_groups, thumbnails


@pytest.fixture
def distinct() -> Tensor:
    """Six unrelated images (6,1,64,64)."""
    return torch.rand((6, 1, 64, 64), generator=torch.Generator().manual_seed(0))


def groups_of(images: Tensor) -> list[int]:
    return duplicate_groups(thumbnails(images)).tolist()


def test_unrelated_images_are_their_own_groups(distinct: Tensor) -> None:
    assert groups_of(distinct) == [0, 1, 2, 3, 4, 5]


def test_copies_share_a_group_and_numbers_follow_first_appearance(distinct: Tensor) -> None:
    images = distinct[[3, 0, 3, 1, 0]]
    assert groups_of(images) == [0, 1, 0, 2, 1]


def test_brightness_contrast_and_faint_noise_do_not_hide_a_copy(distinct: Tensor) -> None:
    noise = 0.01 * torch.randn((1, 1, 64, 64), generator=torch.Generator().manual_seed(1))
    images = torch.cat([distinct, 0.5 * distinct[:1], distinct[1:2] + 0.2, distinct[2:3] + noise])
    assert groups_of(images) == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_a_copy_of_a_copy_belongs_to_the_group() -> None:
    start, step = torch.rand((2, 1024), generator=torch.Generator().manual_seed(0))
    chain = torch.stack([start + 0.03 * number * step for number in range(5)]).view(5, 32, 32)
    correlation = torch.corrcoef(chain.flatten(1))
    assert correlation[0, 4] < 0.999 < min(correlation[number, number + 1] for number in range(4))
    assert duplicate_groups(chain).tolist() == [0, 0, 0, 0, 0]


def test_flat_images_are_duplicates_of_each_other_only(distinct: Tensor) -> None:
    flat = torch.stack([torch.zeros(1, 64, 64), torch.full((1, 64, 64), 0.7)])
    assert groups_of(torch.cat([distinct[:2], flat])) == [0, 1, 2, 2]


def test_color_and_grey_of_one_picture_are_duplicates(distinct: Tensor) -> None:
    assert groups_of(distinct.expand(-1, 3, -1, -1)) == [0, 1, 2, 3, 4, 5]
    assert torch.allclose(thumbnails(distinct.expand(-1, 3, -1, -1)), thumbnails(distinct), atol=1e-6)


def test_groups_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch, distinct: Tensor) -> None:
    monkeypatch.setattr("training.data.duplicates._BLOCK", 2)
    assert groups_of(torch.cat([distinct, distinct.flip(0)])) == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]


def test_no_images_have_no_groups() -> None:
    assert len(duplicate_groups(torch.zeros(0, 32, 32))) == 0


def pairs_agreed(found: npt.NDArray[np.int64], published: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Precision and recall of the pairs that share a group."""
    above = np.triu(np.ones((len(found), len(found)), dtype=bool), k=1)
    ours = (found[:, None] == found) & above
    theirs = (published[:, None] == published) & above
    both = float((ours & theirs).sum())
    return both / float(ours.sum()), both / float(theirs.sum())


def read_published(folder: Path, paths: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    with (folder / "groups.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    thumbs = []
    for row in rows:
        data = (folder / paths.format(row["name"])).read_bytes()
        thumbs.append(thumbnails(torch.from_numpy(decode_image(data, channels=1, size=(224, 224)))[None]))
    return duplicate_groups(torch.cat(thumbs)), np.array([int(row["duplicate_group"]) for row in rows])


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "paths", "precision", "recall"),
    [("brain_mri", "{}", 0.999, 0.999), ("kvasir_seg", "images/{}.jpg", 1.0, 0.66)],
)
def test_groups_agree_with_the_published_list(
    real_data: Path, name: str, paths: str, precision: float, recall: float
) -> None:
    found, published = read_published(real_data / name, paths)
    measured = pairs_agreed(found, published)
    assert measured[0] >= precision
    assert measured[1] >= recall
