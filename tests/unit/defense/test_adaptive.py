"""The defended model with everything known: exact gradients, the identity's in their place, and means over noise."""

import torch
from torch import Tensor, nn

from defense.adaptive import Defended, Smoothed


class Steps(nn.Module):
    """A sanitizer without a gradient: it rounds."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.round(images * 4) / 4


class Mean(nn.Module):
    """A victim: bright or dark."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_(True)
    model(images)[:, 0].sum().backward()
    assert images.grad is not None
    return images.grad


def test_exact_gradients_are_those_of_sanitizer_and_victim_together() -> None:
    images = torch.rand(3, 1, 4, 4)
    assert torch.allclose(
        gradient(Defended(nn.Sigmoid(), Mean()), images), nn.Sigmoid()(images).mul(1 - nn.Sigmoid()(images)) / 16
    )
    assert not gradient(Defended(Steps(), Mean()), images).any()


def test_bpda_passes_the_sanitizer_as_if_it_did_nothing_and_answers_the_same() -> None:
    images = torch.rand(3, 1, 4, 4)
    through = Defended(Steps(), Mean(), identity_backward=True)
    assert torch.equal(through(images), Defended(Steps(), Mean())(images))
    assert torch.allclose(gradient(through, images), torch.full_like(images, 1 / 16))


def test_smoothed_scores_are_means_over_fresh_noise() -> None:
    torch.manual_seed(0)
    images = torch.full((2, 1, 4, 4), 0.3)
    smoothed = Smoothed(nn.Sequential(Steps(), Mean()), sigma=0.5, copies=4000)
    scores = smoothed(images)
    assert scores.shape == (2, 2)
    assert torch.allclose(scores.exp().sum(1), torch.ones(2))
    assert not torch.equal(scores[0], scores[1])
    assert torch.allclose(scores[0], scores[1], atol=0.02)
    assert torch.allclose(scores[0].exp(), torch.tensor([0.3, -0.3]).softmax(0), atol=0.01)
