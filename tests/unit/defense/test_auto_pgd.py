"""Auto-PGD on models whose border is known, and beside PGD on masks."""

import pytest
import torch
from torch import Tensor, nn
from toy_defense import SIDE, Brighter, splits

from defense.attacks import craft
from defense.auto_pgd import auto_pgd
from defense.objectives import agreement


def data(whole: bool) -> tuple[nn.Module, Tensor, Tensor]:
    part = splits(whole).validation
    return Brighter(whole).eval(), part.images, part.labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_classes_it_finds_all_that_there_is_and_no_more(norm: str) -> None:
    model, images, labels = data(True)
    margins = (images.mean((1, 2, 3)) - 0.5).abs() * (1 if norm == "linf" else SIDE)
    epsilon = float(margins.median()) * 1.02
    found = auto_pgd(norm, model, images, labels, epsilon, batch=4)
    wrong = model(found).argmax(1) != labels
    assert wrong.tolist() == (margins < epsilon).tolist()
    change = (found - images).flatten(1)
    assert (change.norm(dim=1, p=2 if norm == "l2" else float("inf")) <= epsilon + 1e-5).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_of_masks_it_takes_the_least_dice_and_is_no_weaker_than_pgd() -> None:
    model, images, masks = data(False)

    def left(attacked: Tensor) -> Tensor:
        return agreement(model(attacked).argmax(1), masks)

    epsilon = 0.1
    within = (images[:, 0] - 0.5).abs() < epsilon  # pixels that can be turned, and so the Dice that is left
    best = torch.where(within, 1 - masks, masks)
    found = left(auto_pgd("linf", model, images, masks, epsilon))
    assert torch.allclose(found, agreement(best, masks), atol=0.02)
    assert (found <= left(craft("pgd", model, images, masks, epsilon)) + 1e-6).all()


def test_nothing_is_left_behind() -> None:
    model, images, labels = data(True)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = auto_pgd("linf", model, images, labels, 0.05, steps=5, seed=1)
    assert torch.equal(first, auto_pgd("linf", model, images, labels, 0.05, steps=5, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
