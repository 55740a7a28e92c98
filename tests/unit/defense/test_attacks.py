import pytest
import torch
from torch import Tensor, nn

from defense.attacks import ATTACKS, attacks_on, craft, minimum_norms, scaled_norms

SHAPE = (1, 6, 6)
BOUNDED = [name for name in attacks_on(torch.zeros(1)) if not ATTACKS[name].minimum_norm]
SIZES = [1, 3, 8]


class Linear(nn.Module):
    """Logits (-s, s) with s = <w, x> - 1/2 sum(w): the boundary passes through the grey image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = nn.Parameter(torch.randn(36, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        score = (images.flatten(1) - 0.5) @ self.weights
        return torch.stack([-score, score], dim=1)

    def optimum(self, images: Tensor, norm: str) -> Tensor:
        """Size of each image's smallest adversarial perturbation: |s| over the dual norm of w."""
        dual = self.weights.norm() if norm == "l2" else self.weights.abs().sum()
        return (self(images)[:, 1].abs() / dual).detach()


@pytest.fixture
def model() -> Linear:
    return Linear().eval()


def grey_images(model: Linear, count: int) -> tuple[Tensor, Tensor]:
    """Images in the middle of the range, so that bounds do not bind, with the model's own labels."""
    images = 0.4 + 0.2 * torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(count))
    return images, model(images).argmax(dim=1)


def size(perturbations: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(perturbations.flatten(1), ord=2 if norm == "l2" else float("inf"), dim=1)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", BOUNDED)
def test_attack_succeeds_just_beyond_the_optimum_of_a_linear_model(name: str, count: int, model: Linear) -> None:
    images, labels = grey_images(model, count)
    epsilon = 1.02 * model.optimum(images, ATTACKS[name].norm).max().item()
    assert (model(craft(name, model, images, labels, epsilon)).argmax(dim=1) != labels).all()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", BOUNDED)
def test_attack_fails_just_inside_the_optimum_of_a_linear_model(name: str, count: int, model: Linear) -> None:
    images, labels = grey_images(model, count)
    epsilon = 0.98 * model.optimum(images, ATTACKS[name].norm).min().item()
    assert (model(craft(name, model, images, labels, epsilon)).argmax(dim=1) == labels).all()


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_linf_attacks_end_in_the_corner_of_the_ball(name: str, model: Linear) -> None:
    images, labels = grey_images(model, 3)
    away = torch.where(labels == 1, -1.0, 1.0).view(-1, 1, 1, 1)
    best = images + 0.05 * away * model.weights.sign().view(SHAPE)
    torch.testing.assert_close(craft(name, model, images, labels, 0.05), best.detach())


def test_pgd_l2_ends_on_the_normal_of_the_boundary(model: Linear) -> None:
    images, labels = grey_images(model, 3)
    found = craft("pgd-l2", model, images, labels, 0.2) - images
    away = torch.where(labels == 1, -1.0, 1.0).view(-1, 1)
    normal = (model.weights / model.weights.norm()).detach()
    assert ((found.flatten(1) * away) @ normal / 0.2 > 0.97).all()


@pytest.mark.parametrize("count", SIZES)
def test_ddn_comes_close_to_the_smallest_norm_of_a_linear_model(count: int, model: Linear) -> None:
    images, labels = grey_images(model, count)
    norms = minimum_norms(model, images, craft("ddn", model, images, labels), labels)
    optimum = model.optimum(images, "l2")
    assert (norms >= optimum * (1 - 1e-4)).all()
    assert (norms <= optimum * 1.1).all()


class Curved(nn.Module):
    """Three classes of four pixels, far from linear."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = torch.arange(12.0).view(4, 3).sin(), torch.arange(9.0).view(3, 3).cos()
        return (2 * (images.flatten(1) - 0.5) @ first).tanh() @ second


@pytest.mark.parametrize(
    ("name", "epsilon", "steps", "expected"),
    [
        ("fgsm", 0.1, None, [[0.1, -0.1, 0.1, -0.1], [-0.1, 0.1, -0.1, 0.1]]),
        ("pgd", 0.1, 5, [[0.1, -0.1, 0.1, -0.1], [-0.1, 0.1, -0.1, 0.1]]),
        ("pgd-l2", 0.15, 5, [[0.0654, -0.05002, 0.09207, -0.08511], [-0.05849, 0.06282, -0.08903, 0.08489]]),
        ("ddn", None, 30, [[0.0787, -0.15475, 0.22769, -0.29609], [-0.08552, 0.15813, -0.22758, 0.29247]]),
    ],
)
def test_attacks_find_what_foolbox_3_3_4_found(
    name: str, epsilon: float | None, steps: int | None, expected: list[list[float]]
) -> None:
    model = Curved().eval()
    images = torch.tensor([[0.2, 0.9, 0.4, 0.7], [0.6, 0.1, 0.8, 0.3]]).view(2, 1, 2, 2)
    found = craft(name, model, images, model(images).argmax(1), epsilon, steps=steps, seed=1) - images
    torch.testing.assert_close(found.flatten(1), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", attacks_on(torch.zeros(1)))
def test_images_at_the_edge_of_the_range_stay_inside_it(name: str, count: int, model: Linear) -> None:
    images = torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(1)).round()
    epsilon = None if ATTACKS[name].minimum_norm else 0.3
    found = craft(name, model, images, model(images).argmax(dim=1), epsilon)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, 0.1, 2.0])
@pytest.mark.parametrize("name", BOUNDED)
def test_perturbation_never_exceeds_epsilon(name: str, epsilon: float, model: Linear) -> None:
    images = torch.rand((8, *SHAPE), generator=torch.Generator().manual_seed(2))
    found = craft(name, model, images, model(images).argmax(dim=1), epsilon)
    assert (size(found - images, ATTACKS[name].norm) <= epsilon + 1e-6).all()


def test_random_starts_follow_from_the_seed_and_leave_the_global_generator_alone(model: Linear) -> None:
    images, labels = grey_images(model, 3)
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    first, again = (craft("pgd-l2", model, images, labels, 0.1, steps=1, seed=3) for _ in range(2))
    other = craft("pgd-l2", model, images, labels, 0.1, steps=1, seed=4)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parameters_keep_no_gradient_and_stay_trainable(model: Linear) -> None:
    images, labels = grey_images(model, 3)
    craft("pgd", model, images, labels, 0.1)
    assert model.weights.grad is None
    assert model.weights.requires_grad


def test_batches_make_no_difference_without_random_start(model: Linear) -> None:
    images, labels = grey_images(model, 8)
    whole, parts = (craft("ddn", model, images, labels, batch=batch) for batch in (8, 3))
    torch.testing.assert_close(whole, parts)


def test_no_images_give_no_images(model: Linear) -> None:
    assert craft("pgd", model, torch.zeros((0, *SHAPE)), torch.zeros(0, dtype=torch.int64), 0.1).shape == (0, *SHAPE)


def test_ddn_norm_is_zero_where_the_model_errs_already(model: Linear) -> None:
    images, labels = grey_images(model, 3)
    assert (minimum_norms(model, images, craft("ddn", model, images, 1 - labels), 1 - labels) == 0).all()


def test_ddn_norm_is_infinite_where_nothing_was_found() -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(images), 2) + 0 * images.flatten(1)[:, :1]

    images, labels = torch.full((3, *SHAPE), 0.5), torch.zeros(3, dtype=torch.int64)
    constant = Constant().eval()
    found = craft("ddn", constant, images, labels, steps=5)
    assert torch.equal(found, images)
    assert minimum_norms(constant, images, found, labels).isinf().all()


@pytest.mark.parametrize(
    ("name", "epsilon", "message"),
    [
        ("cw", 0.1, "unknown attack 'cw'"),
        ("pgd", None, "pgd takes an epsilon"),
        ("ddn", 0.1, "ddn takes no epsilon"),
        ("pgd", -0.1, "at least 0"),
        ("pgd", float("nan"), "at least 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    name: str, epsilon: float | None, message: str, model: Linear
) -> None:
    images, labels = grey_images(model, 1)
    with pytest.raises(ValueError, match=message):
        craft(name, model, images, labels, epsilon)


def test_fgsm_has_one_step(model: Linear) -> None:
    images, labels = grey_images(model, 1)
    with pytest.raises(ValueError, match="exactly one step"):
        craft("fgsm", model, images, labels, 0.1, steps=2)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_images_outside_the_range_are_refused(value: float, model: Linear) -> None:
    with pytest.raises(ValueError, match="images must lie in"):
        craft("fgsm", model, torch.full((1, *SHAPE), value), torch.zeros(1, dtype=torch.int64), 0.1)


def test_model_in_training_mode_is_refused(model: Linear) -> None:
    images, labels = grey_images(model, 1)
    with pytest.raises(ValueError, match="training mode"):
        craft("fgsm", model.train(), images, labels, 0.1)


def mean_above(threshold: float) -> nn.Module:
    class Threshold(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = images.flatten(1).mean(1) - threshold
            return torch.stack([-score, score], dim=1)

    return Threshold()


def test_scaled_norm_finds_the_boundary_along_the_direction() -> None:
    images = torch.full((2, *SHAPE), 0.3)
    labels = torch.zeros(2, dtype=torch.int64)
    adversarials = images + 0.01  # each unit of the factor lifts the mean by 0.01, an L2 norm of 0.06
    norms = scaled_norms(mean_above(0.4001), images, adversarials, labels, halvings=10)
    torch.testing.assert_close(norms, torch.full((2,), 0.1001 * 6), rtol=2e-3, atol=0)
    assert (norms >= 0.1001 * 6 - 1e-5).all()  # an upper bound: the answer there is wrong


def test_scaled_norm_may_be_smaller_than_the_perturbation() -> None:
    images, labels = torch.full((1, *SHAPE), 0.3), torch.zeros(1, dtype=torch.int64)
    norms = scaled_norms(mean_above(0.32), images, images + 0.1, labels, halvings=8)
    assert norms.item() == pytest.approx(0.02 * 6, rel=0.05)


def test_scaled_norm_is_that_of_the_clipped_perturbation() -> None:
    images, labels = torch.full((1, *SHAPE), 0.9), torch.zeros(1, dtype=torch.int64)
    norms = scaled_norms(mean_above(0.9999), images, images + 0.03, labels)
    assert norms.item() == pytest.approx(0.1 * 6, rel=1e-3)


def test_scaled_norm_is_zero_when_wrong_already_and_infinite_when_never_wrong() -> None:
    images = torch.stack([torch.full(SHAPE, 0.6), torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.3)])
    labels = torch.zeros(3, dtype=torch.int64)
    adversarials = images + torch.tensor([0.1, -0.1, 0.0]).view(-1, 1, 1, 1)
    norms = scaled_norms(mean_above(0.5), images, adversarials, labels)
    assert norms.tolist() == [0.0, float("inf"), float("inf")]
