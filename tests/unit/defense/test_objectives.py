import math

import pytest
import torch

from defense.objectives import agreement, denoising_loss, inject_gradient, located_loss, stability_loss


def test_stability_loss_is_the_cross_entropy_of_probabilities_and_of_logits():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    targets = torch.tensor([1, 2])
    expected = torch.tensor([math.log(math.exp(-1) + 1 + math.exp(-1.5)), math.log(3)])
    torch.testing.assert_close(stability_loss(logits, targets, "logits"), expected)
    torch.testing.assert_close(stability_loss(logits.softmax(1), targets, "probabilities"), expected)


def test_a_probability_of_zero_gives_a_finite_loss():
    loss = stability_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), "probabilities")
    assert 80 < loss.item() < 100


def test_denoising_loss_is_per_image():
    clean = torch.zeros(2, 1, 4, 4)
    sanitized = clean.clone()
    sanitized[1, 0, 0, 0] = 2
    assert denoising_loss(sanitized, clean).tolist() == [0, 4 / 16]


def test_an_injected_gradient_arrives_where_the_points_come_from():
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    points = weight * torch.ones(4, 2)
    gradient = torch.arange(8.0).view(4, 2).requires_grad_(True)
    inject_gradient(points, gradient).backward()
    torch.testing.assert_close(weight.grad, gradient.detach().mean(0))
    assert gradient.grad is None


# Masks


def mask_scores(classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, classes, 6, 5, generator=torch.Generator().manual_seed(seed))


def masks(classes: int) -> torch.Tensor:
    return torch.randint(classes, (3, 6, 5), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_loss_of_masks_is_cross_entropy_and_soft_dice(classes):
    scores, targets = mask_scores(classes), masks(classes)
    probabilities = scores.softmax(1)
    for image in range(3):
        entropy = -sum(
            probabilities[image, targets[image, row, column], row, column].log()
            for row in range(6)
            for column in range(5)
        )
        dice = []
        for label in range(1, classes):
            wanted, found = (targets[image] == label).float(), probabilities[image, label]
            dice.append((2 * (wanted * found).sum() + 1) / (wanted.sum() + found.sum() + 1))
        expected = entropy / 30 + 1 - sum(dice) / len(dice)
        for kind, given in (("logits", scores), ("probabilities", probabilities)):
            assert stability_loss(given, targets, kind)[image].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_mask_that_is_empty_as_it_should_be_costs_nothing():
    scores = torch.zeros(1, 2, 4, 4)
    scores[:, 0] = 30
    assert stability_loss(scores, torch.zeros(1, 4, 4, dtype=torch.int64), "logits").item() == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_the_located_loss_sums_to_the_loss_and_to_its_gradient(classes, kind):
    scores, targets = mask_scores(classes), masks(classes)
    scores = (scores if kind == "logits" else scores.softmax(1)).requires_grad_(True)
    whole = stability_loss(scores, targets, kind)
    located = located_loss(scores, targets, kind, around=scores.detach())
    assert located.shape == targets.shape
    torch.testing.assert_close(located.flatten(1).sum(1), whole)
    (expected,) = torch.autograd.grad(whole.sum(), scores)
    (found,) = torch.autograd.grad(located.sum(), scores)
    torch.testing.assert_close(found, expected)


def test_a_pixel_that_does_not_change_does_not_change_its_located_loss():
    before, targets = mask_scores(2), masks(2)
    after = before.clone()
    after[:, :, 2, 3] += torch.tensor([1.0, -1.0])
    moved = located_loss(after, targets, "logits", around=before) - located_loss(
        before, targets, "logits", around=before
    )
    assert (moved[:, 2, 3] != 0).all()
    moved[:, 2, 3] = 0
    assert (moved == 0).all()


def test_agreement_of_classes_is_equality_and_of_masks_dice():
    assert agreement(torch.tensor([1, 2]), torch.tensor([1, 0])).tolist() == [1, 0]
    answers, targets = torch.zeros(4, 2, 2, dtype=torch.int64), torch.zeros(4, 2, 2, dtype=torch.int64)
    answers[0, 0] = 1
    targets[0, :, 0] = 1  # one of two pixels each in common
    answers[1, 0], targets[1, 0] = 1, 2  # same places, other class
    answers[2, 0] = 1
    assert agreement(answers, targets).tolist() == [0.5, 0, 0, 1]
