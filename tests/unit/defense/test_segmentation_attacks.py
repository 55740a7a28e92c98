"""Attacks on segmenters, against models of which the best attack is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.attacks import ATTACKS, LOST, attacks_on, craft, minimum_norms, scaled_norms
from defense.objectives import agreement, stability_loss

SIDE = 8
BOUNDED = [name for name in attacks_on(torch.zeros(1, 1, 1)) if not ATTACKS[name].minimum_norm]


class Threshold(nn.Module):
    """Every pixel for itself: logits (0, slope (x - 1/2))."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        score = self.slope * (images[:, :1] - 0.5)
        return torch.cat([torch.zeros_like(score), score], dim=1)


def frames(count: int = 3, margin: float = 0.1) -> tuple[Tensor, Tensor]:
    """Images whose left half is brighter than one half by a margin, the right half as much darker; their masks."""
    masks = (torch.arange(SIDE) < SIDE // 2).long().expand(count, SIDE, SIDE).contiguous()
    return (0.5 + margin * (2 * masks.float() - 1)).unsqueeze(1), masks


@pytest.fixture
def model() -> Threshold:
    return Threshold().eval()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 1))
    return nn.Sequential(*layers).eval()


def network_frames(count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model = network()
    images = 0.3 + 0.4 * torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(images)
        middle = (logits[:, 1] - logits[:, 0]).flatten(1).median(1).values  # so that half of the pixels are foreground
        return model, images, ((logits[:, 1] - logits[:, 0]) > middle.mean()).long()


def size(perturbation: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(perturbation.flatten(1), ord=2 if norm == "l2" else float("inf"), dim=1)


@pytest.mark.parametrize("name", BOUNDED)
def test_perturbations_stay_in_their_ball_and_in_the_image(name: str) -> None:
    model, images, masks = network_frames()
    epsilon = 0.5 if ATTACKS[name].norm == "l2" else 0.05
    found = craft(name, model, images, masks, epsilon)
    assert found.shape == images.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert (size(found - images, ATTACKS[name].norm) <= epsilon * (1 + 1e-5)).all()
    torch.testing.assert_close(craft(name, model, images, masks, 0.0), images)
    assert torch.equal(craft(name, model, images, masks, epsilon), found)  # the seed decides
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fgsm", "pgd", "segpgd"])
def test_where_every_pixel_is_for_itself_the_best_step_is_known(name: str, model: Threshold) -> None:
    images, masks = frames()
    inside, beyond = (craft(name, model, images, masks, epsilon) for epsilon in (0.095, 0.105))
    assert (model(inside).argmax(1) == masks).all()
    assert (model(beyond).argmax(1) != masks).all()


def test_a_single_step_is_that_of_cross_entropy_and_dice() -> None:
    model, images, masks = network_frames()
    points = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(stability_loss(model(points), masks, "logits").sum(), points)
    torch.testing.assert_close(craft("fgsm", model, images, masks, 0.01), images + 0.01 * gradient.sign())


def loss_of(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    with torch.no_grad():
        return float(stability_loss(model(images), masks, "logits").mean())


def test_many_steps_do_more_than_one_and_more_room_does_more() -> None:
    model, images, masks = network_frames()
    losses = [loss_of(model, craft(name, model, images, masks, 0.1), masks) for name in ("fgsm", "pgd")]
    assert loss_of(model, images, masks) < losses[0] < losses[1]
    assert loss_of(model, craft("pgd", model, images, masks, 0.2), masks) > losses[1]


def test_an_image_is_attacked_the_same_whatever_else_is_in_the_batch() -> None:
    model, images, masks = network_frames()
    together = craft("fgsm", model, images, masks, 0.05)
    torch.testing.assert_close(craft("fgsm", model, images[2:4], masks[2:4], 0.05), together[2:4])
    torch.testing.assert_close(craft("fgsm", model, images, masks, 0.05, batch=4), together)


def test_segpgd_weighs_wrong_pixels_more_and_more() -> None:
    """Two steps: the first counts right pixels only, the second wrong ones by 1/4 (lambda = (t - 1) / 2T)."""
    model, images, masks = network_frames()
    epsilon, rate = 0.05, 2.5 / 2
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    start = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    torch.set_rng_state(generator_state)
    points = start
    for share in (0.0, 1 / 4):
        points = points.detach().requires_grad_(True)
        logits = model(points)
        weights = torch.where(logits.argmax(1) == masks, 1 - share, share)
        loss = (weights * F.cross_entropy(logits, masks, reduction="none")).sum()
        (gradient,) = torch.autograd.grad(loss, points)
        stepped = points.detach() + rate * epsilon * gradient.sign()
        points = (images + (stepped - images).clamp(-epsilon, epsilon)).clamp(0, 1)
    found = craft("segpgd", model, images, masks, epsilon, steps=2)
    assert ((found - points).abs() < 1e-6).float().mean() > 0.99  # but for the sign of gradients next to zero


def test_the_minimum_norm_attack_comes_near_the_smallest_perturbation_that_loses_the_mask(model: Threshold) -> None:
    """Of a mask of m pixels at least k have to go, each by the margin, so that the Dice falls below one half."""
    images, masks = frames()
    pixels = SIDE * SIDE // 2
    # Missing k of them leaves 2 (m - k) / (2 m - k); adding k beside it 2 m / (2 m + k): the former is cheaper.
    needed = min(k for k in range(pixels + 1) if 2 * (pixels - k) / (2 * pixels - k) < LOST)
    smallest = 0.1 * needed**0.5
    found = craft("ddn", model, images, masks)
    norms = minimum_norms(model, images, found, masks)
    assert torch.isfinite(norms).all()
    assert (norms >= smallest * (1 - 1e-4)).all()
    # Its gradient is that of all pixels, those that need not go or are gone already among them.
    assert (norms < 0.1 * SIDE).all()  # what it takes if all pixels go
    assert (norms <= 1.5 * smallest).all()
    assert (agreement(model(found).argmax(1), masks) < LOST).all()


class Together(nn.Module):
    """All pixels of a mask answer the same: logits (0, <w, x> + b), so that the mask holds or is lost as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.randn(1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))

    def score(self, images: Tensor) -> Tensor:
        return ((images - 0.5) * self.weights).flatten(1).sum(1)

    def forward(self, images: Tensor) -> Tensor:
        score = self.score(images).view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE)
        return torch.cat([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_minimum_norm_attack_finds_the_distance_to_a_plane(count: int) -> None:
    """Where all pixels go together, the smallest perturbation is |<w, x> + b| / |w|, as of a linear classifier."""
    model = Together().eval()
    distances = torch.linspace(0.1, 0.5, count)
    direction = model.weights / model.weights.norm()
    images = 0.5 + distances.view(-1, 1, 1, 1) * direction
    masks = torch.ones(count, SIDE, SIDE, dtype=torch.int64)
    norms = minimum_norms(model, images, craft("ddn", model, images, masks), masks)
    assert (norms >= distances * (1 - 1e-4)).all()
    assert (norms <= 1.01 * distances).all()


def test_what_is_lost_already_needs_nothing_and_what_holds_was_not_found(model: Threshold) -> None:
    images, masks = frames()
    assert minimum_norms(model, images, images, 1 - masks).tolist() == [0, 0, 0]
    assert minimum_norms(model, images, images, masks).tolist() == [float("inf")] * 3


def test_scaled_perturbations_lose_the_mask_where_the_closed_form_says(model: Threshold) -> None:
    images, masks = frames()
    adversarials = images - 0.02 * (2 * masks.float() - 1).unsqueeze(1)
    norms = scaled_norms(model, images, adversarials, masks)
    exact = 0.1 * SIDE  # all pixels reach the threshold together
    assert ((norms >= exact * (1 - 1e-4)) & (norms < 1.05 * exact)).all()


def test_an_attack_on_masks_is_refused_for_classes(model: Threshold) -> None:
    images, masks = frames()
    with pytest.raises(ValueError, match=r"segpgd attacks masks \(N,H,W\); the labels are of shape \(3,\)"):
        craft("segpgd", model, images, masks[:, 0, 0], 0.1)
