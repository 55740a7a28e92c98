"""Local credit against what it is derived from: each window's own slope, and the variance of what else moved."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from defense.errors import BudgetExhausted
from defense.estimators import LocalGradientEstimator, Loss, Points, RandomGradientEstimator
from defense.objectives import located_loss, stability_loss

MU = 0.01


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


class Spread:
    """A linear black box on (2, 6, 6) points: each pixel's loss is a weighted sum within `reach` cells around it."""

    def __init__(self, reach: int) -> None:
        side = 2 * reach + 1
        self.weights = normal(1, 2, side, side, seed=3)
        self.spent = 0

    def map(self, points: Tensor) -> Tensor:
        return F.conv2d(points, self.weights, padding=self.weights.shape[-1] // 2).squeeze(1)

    def located(self, points: Points) -> Tensor:
        self.spent += len(points.z)
        return self.map(points.z)

    def loss(self) -> Loss:
        return Loss(lambda points: self.located(points).flatten(1).sum(1), located=self.located)

    def gradient(self, z: Tensor) -> Tensor:
        z = z.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.map(z).sum(), z)
        return gradient


Z = normal(1, 2, 6, 6, seed=1).expand(3, -1, -1, -1)


def mean_of_many(estimator: LocalGradientEstimator, box: Spread, repeats: int = 1000) -> tuple[Tensor, Tensor]:
    """Mean estimate at the first image, and its standard error."""
    source = generator()
    found = torch.cat([estimator(Z, box.loss(), source).gradient for _ in range(repeats)])
    return found.mean(0), found.std(0) / math.sqrt(len(found))


def test_where_nothing_leaves_the_window_it_is_unbiased():
    box = Spread(reach=1)
    mean, error = mean_of_many(LocalGradientEstimator(4, MU, window=3), box)
    assert ((mean - box.gradient(Z)[0]).abs() < 5 * error).all()


def test_what_leaves_the_window_is_not_seen():
    box = Spread(reach=1)
    mean, error = mean_of_many(LocalGradientEstimator(4, MU, window=1), box)
    middle = box.weights[0, :, 1, 1].view(2, 1, 1).expand(2, 6, 6)  # the cell's own pixel only
    assert ((mean - middle).abs() < 5 * error).all()


def test_its_variance_is_that_of_what_else_moves_the_window():
    """Formula 10: sum over the window's other coordinates of their squared slopes."""
    box, q = Spread(reach=0), 5
    window = 3
    # Every pixel depends on the two numbers of its cell: the slope of a window along another of its numbers is the
    # weight itself. Of a cell in the middle, 9 cells x 2 numbers, less its own.
    weights = box.weights.flatten()
    expected = 0.0
    for row in range(6):
        for column in range(6):
            cells = (min(row + 1, 5) - max(row - 1, 0) + 1) * (min(column + 1, 5) - max(column - 1, 0) + 1)
            whole = cells * weights.square().sum().item()
            expected += sum(whole - weight**2 for weight in weights.tolist()) / q
    estimator, source = LocalGradientEstimator(q, MU, window), generator()
    errors = []
    for _ in range(600):
        estimate = estimator(Z, box.loss(), source)
        errors.append((estimate.gradient - box.gradient(Z)).square().flatten(1).sum(1))
    measured = torch.cat(errors)
    tolerance = 5 * measured.std().item() / math.sqrt(len(measured))
    assert measured.mean().item() == pytest.approx(expected, abs=tolerance)


def test_a_window_over_everything_is_rge_with_random_signs():
    """Error ((d - 1) / q) |g|^2, whatever the dimension is (formula 2)."""
    box = Spread(reach=1)
    true = box.gradient(Z)
    source, errors = generator(), []
    for _ in range(400):
        estimate = LocalGradientEstimator(6, MU, window=11)(Z, box.loss(), source)
        errors.append((estimate.gradient - true).square().flatten(1).sum(1))
    measured = torch.cat(errors)
    expected = (72 - 1) / 6 * true[0].square().sum().item()
    assert measured.mean().item() == pytest.approx(expected, abs=5 * measured.std().item() / math.sqrt(len(measured)))


def test_a_code_cell_owns_the_pixels_it_is_decoded_to():
    weights = normal(3, seed=4)

    def located(points: Points) -> Tensor:
        cells = torch.einsum("c,mcij->mij", weights, points.z)
        return cells.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2) / 16

    loss = Loss(lambda points: located(points).flatten(1).sum(1), located=located)
    source = generator()
    estimator = LocalGradientEstimator(8, MU, window=1)
    found = torch.cat([estimator(torch.zeros(4, 3, 2, 2), loss, source).gradient for _ in range(500)])
    tolerance = 5 * found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - weights.view(3, 1, 1)).abs() < tolerance).all()


def test_local_credit_needs_fewer_queries_than_rge_on_a_segmenter():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(8, 2, 3, padding=1)
    ).requires_grad_(False)
    z = normal(8, 1, 16, 16, seed=5)
    targets = network(z + 0.5 * normal(8, 1, 16, 16, seed=6)).argmax(1)

    def located(points: Points) -> Tensor:
        scores = network(points.z)
        return located_loss(scores, targets[points.owners], "logits", around=scores[points.centers][points.owners])

    loss = Loss(lambda points: stability_loss(network(points.z), targets[points.owners], "logits"), located=located)
    points = z.clone().requires_grad_(True)
    (true,) = torch.autograd.grad(stability_loss(network(points), targets, "logits").sum(), points)

    def cosine(estimate: Tensor) -> float:
        return F.cosine_similarity(estimate.flatten(1), true.flatten(1)).mean().item()

    local = cosine(LocalGradientEstimator(16, MU, window=5)(z, loss, generator()).gradient)
    whole = cosine(RandomGradientEstimator(64, MU)(z, loss, generator()).gradient)
    assert local > whole > 0.2


def test_the_loss_and_the_price_are_told():
    box = Spread(reach=1)
    estimate = LocalGradientEstimator(7, MU, window=3)(Z, box.loss(), generator())
    assert estimate.spent == box.spent == 3 * 8 == 3 * LocalGradientEstimator(7, MU, 3).evaluations(72)
    torch.testing.assert_close(estimate.loss, box.map(Z).flatten(1).sum(1))
    estimate = LocalGradientEstimator(7, MU, window=3)(Z, box.loss(), generator(), budget=3 * 5 + 2)
    assert estimate.spent == 3 * 5
    with pytest.raises(BudgetExhausted, match="no direction"):
        LocalGradientEstimator(7, MU, window=3)(Z, box.loss(), generator(), budget=5)


@pytest.mark.parametrize("window", [0, 4])
def test_a_window_has_a_middle(window):
    with pytest.raises(ValueError, match="odd number of cells"):
        LocalGradientEstimator(1, MU, window)


def test_what_cannot_be_located_is_refused():
    box = Spread(reach=1)
    estimator = LocalGradientEstimator(2, MU, 3)
    with pytest.raises(ValueError, match="answers for every pixel"):
        estimator(Z, Loss(lambda points: points.z.flatten(1).sum(1)), generator())
    with pytest.raises(ValueError, match=r"points \(N, c, h, w\)"):
        estimator(Z.flatten(1), box.loss(), generator())
    with pytest.raises(ValueError, match="do not divide"):
        estimator(
            torch.zeros(1, 2, 4, 4),
            Loss(box.loss().black_box, located=lambda points: torch.zeros(len(points.z), 6, 6)),
            generator(),
        )
