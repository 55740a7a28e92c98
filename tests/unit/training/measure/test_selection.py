from collections import Counter

import torch

from training.measure.selection import stratified_order


def test_order_keeps_the_classes_proportions_in_every_beginning() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    for limit in (10, 20, 50, 100):
        counts = Counter(labels[stratified_order(labels, limit, seed=3)].tolist())
        for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
            assert abs(counts[label] - share * limit) <= 1


def test_order_is_deterministic_and_a_smaller_limit_is_its_beginning() -> None:
    labels = torch.arange(40) % 4
    whole = stratified_order(labels, None, seed=1)
    assert sorted(whole) == list(range(40))
    assert stratified_order(labels, 7, seed=1) == whole[:7]
    assert stratified_order(labels, 400, seed=1) == whole
    assert stratified_order(labels, None, seed=2) != whole
