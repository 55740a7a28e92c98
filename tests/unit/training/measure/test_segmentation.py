import pytest
import torch

from training.measure.segmentation import dice, iou


def masks(*counts: int, value: int = 1) -> torch.Tensor:
    """Masks (N,10,10) whose first `count` pixels are of a class."""
    flat = torch.zeros(len(counts), 100, dtype=torch.int64)
    for row, count in zip(flat, counts, strict=True):
        row[:count] = value
    return flat.view(-1, 10, 10)


def test_overlap_is_counted_image_by_image() -> None:
    answers, truth = masks(20, 10, 0, 5), masks(20, 30, 10, 0)
    assert dice(answers, truth).tolist() == pytest.approx([1, 0.5, 0, 0])
    assert iou(answers, truth).tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert dice(answers, truth).shape == iou(answers, truth).shape == (4,)


def test_nothing_found_where_nothing_is_is_right() -> None:
    assert dice(masks(0), masks(0)).tolist() == iou(masks(0), masks(0)).tolist() == [1]


def test_every_class_but_the_first_is_foreground() -> None:
    assert dice(masks(10, value=2), masks(30)).tolist() == pytest.approx([0.5])
