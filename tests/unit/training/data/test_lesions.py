import torch

from training.data.lesions import small_lesions


def test_small_lesions_cover_less_than_a_twentieth_and_something() -> None:
    masks = torch.zeros(5, 100, dtype=torch.int64)
    for mask, count in zip(masks, (0, 1, 4, 5, 50), strict=True):
        mask[:count] = 2
    assert small_lesions(masks.view(5, 10, 10)).tolist() == [False, True, True, False, False]
