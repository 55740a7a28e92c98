import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.datasets import ImageSet
from training.victim.tasks import Classification, Segmentation, SegmentationScore

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Says class 1 whatever it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([0.0, 5.0, 0.0]).expand(len(images), 3)


class Reader(nn.Module):
    """Reads the mask from the picture: bright is class 1."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(images), 20 * (images - 0.5)], dim=1)


def test_a_classifier_is_scored_by_class() -> None:
    data = ImageSet(torch.zeros(6, 1, 32, 32), torch.tensor([0, 1, 1, 2, 1, 0]), tuple("abcdef"))
    score = Classification(("cat", "dog", "emu")).score(Constant(), data, CPU)
    assert score.accuracy == 0.5
    assert score.correct == (0, 3, 0)
    assert score.count == (2, 3, 1)
    assert score.report()["classes"]["dog"] == {"accuracy": 1.0, "correct": 3, "count": 3}
    assert score.table().splitlines() == [
        "cat    0.0%  (0 of 2)",
        "dog  100.0%  (3 of 3)",
        "emu    0.0%  (0 of 1)",
        "test   50.0%  (3 of 6)",
    ]


@pytest.fixture
def painted() -> ImageSet:
    """Four pictures of which a reader gets the first two right, the third half, and the fourth not at all."""
    masks = torch.zeros(4, 16, 16, dtype=torch.int64)
    masks[0, :2, :2] = 1  # small
    masks[1, :8, :8] = 1
    masks[2, :8, :8] = 1
    masks[3, :4] = 1
    images = masks.float().unsqueeze(1)
    images[2, :, 4:8, :8] = 0
    images[3] = 1 - images[3]
    return ImageSet(images, masks, tuple("abcd"))


def test_a_segmenter_is_scored_by_image_and_small_lesions_apart(painted: ImageSet) -> None:
    score = Segmentation(("background", "polyp")).score(Reader(), painted, CPU)
    assert score.dice.tolist() == pytest.approx([1, 1, 2 / 3, 0])
    report = score.report()
    assert report["dice"] == pytest.approx(2 / 3)
    assert report["iou"] == pytest.approx(2.5 / 4)
    assert report["median_dice"] == pytest.approx(5 / 6)
    assert report["count"] == 4
    assert report["small_lesions"] == {"dice": 1, "iou": 1, "median_dice": 1, "count": 1}
    small, test = score.table().splitlines()
    assert small.startswith("small lesions")
    assert small.endswith("(1 images)")
    assert "Dice 0.667  IoU 0.625  median Dice 0.833  (4 images)" in test


def test_no_small_lesions_are_no_number_and_no_line(painted: ImageSet) -> None:
    score = Segmentation(("background", "polyp")).score(Reader(), painted.subset([1, 2]), CPU)
    assert score.report()["small_lesions"] == {"dice": None, "iou": None, "median_dice": None, "count": 0}
    assert len(score.table().splitlines()) == 1


def test_a_segmenter_is_ranked_by_dice_and_then_by_loss() -> None:
    def ranked(dice: float, loss: float) -> tuple[float, float]:
        return SegmentationScore(loss, torch.tensor([dice]), torch.zeros(1), torch.zeros(1, dtype=torch.bool)).rank

    assert ranked(0.8, 2.0) > ranked(0.7, 1.0) > ranked(0.7, 1.5)


def test_a_segmenters_loss_is_soft_dice_and_binary_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(3, 1, 16, 16, generator=generator)
    masks = (torch.rand(3, 16, 16, generator=generator) < 0.2).long()
    logits = torch.cat([torch.zeros_like(plane), plane], dim=1)
    chance, truth = plane.sigmoid().squeeze(1), masks.float()
    dice = 1 - 2 * (chance * truth).sum((1, 2)) / (chance.sum((1, 2)) + truth.sum((1, 2)))
    expected = dice.mean() + F.binary_cross_entropy_with_logits(plane.squeeze(1), truth)
    assert Segmentation(("background", "polyp")).loss(logits, masks).item() == pytest.approx(expected.item(), rel=1e-4)


def test_masks_are_varied_with_their_images_and_classes_stay(painted: ImageSet) -> None:
    generator = torch.Generator().manual_seed(0)
    _, masks = Segmentation(("background", "polyp")).augment(painted.images, painted.labels, generator)
    assert not torch.equal(masks, painted.labels)
    labels = torch.tensor([0, 1, 0, 1])
    assert torch.equal(Classification(("a", "b")).augment(painted.images, labels, generator)[1], labels)
