import math

import torch

from defense.objectives import denoising_loss, inject_gradient, stability_loss


def test_stability_loss_is_the_cross_entropy_of_probabilities_and_of_logits():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    targets = torch.tensor([1, 2])
    expected = torch.tensor([math.log(math.exp(-1) + 1 + math.exp(-1.5)), math.log(3)])
    torch.testing.assert_close(stability_loss(logits, targets, "logits"), expected)
    torch.testing.assert_close(stability_loss(logits.softmax(1), targets, "probabilities"), expected)


def test_stability_loss_takes_any_leading_shape():
    scores = torch.rand(4, 5, 3).softmax(2)
    targets = torch.randint(3, (4, 5))
    assert stability_loss(scores, targets, "probabilities").shape == (4, 5)


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
