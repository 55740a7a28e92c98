import pytest
import torch
from torch import Tensor

from defense.objectives import stability_loss
from defense.student_networks import DenseStudentNetwork, StudentNetwork
from defense.surrogates import Answers, Surrogate, SurrogateSettings

SHAPE = (1, 16, 16)
CPU = torch.device("cpu")


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def victim(batch: Tensor) -> Tensor:
    """Compares the two sides of an image."""
    difference = (batch[..., :8] - batch[..., 8:]).mean((1, 2, 3))
    return torch.stack([40 * difference, -40 * difference], dim=1).softmax(1)


def surrogate(**settings) -> Surrogate:
    return Surrogate(SHAPE, 2, SurrogateSettings(**settings), seed=0, device=CPU)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 16, 24), (1, 64, 64), (3, 32, 200)])
def test_the_student_takes_images_of_any_shape(shape):
    assert StudentNetwork(shape, 5)(torch.rand(2, *shape)).shape == (2, 5)
    assert DenseStudentNetwork(shape, 3)(torch.rand(2, *shape)).shape == (2, 3, *shape[1:])


def test_answers_are_kept_in_order_however_many():
    answers = Answers({"number": ((), torch.float32), "pair": ((2,), torch.int8)})
    for start in range(0, 50, 5):
        numbers = torch.arange(start, start + 5)
        answers.append({"number": numbers, "pair": torch.stack([numbers, -numbers], 1)})
    assert len(answers) == 50
    assert answers.rows()["number"].tolist() == list(range(50))
    assert answers.rows(45)["pair"].tolist() == [[n, -n] for n in range(45, 50)]


def test_half_of_a_sample_is_recent():
    answers = Answers({"number": ((), torch.float32)})
    answers.append({"number": torch.arange(1000)})
    drawn = answers.sample(400, 10, torch.Generator().manual_seed(0))["number"]
    assert (drawn[200:] >= 990).all()
    assert (drawn[:200] < 990).float().mean() > 0.9


def test_the_student_learns_the_victim_and_its_gradient():
    student = surrogate()
    seen = images(2000)
    student.observe(seen, victim(seen), "probabilities")
    before = student.learn(1, from_scratch=True)
    after = student.learn(200, from_scratch=True)
    assert after < 0.3 * before
    new = images(64, seed=1)
    targets = victim(new).argmax(1)
    points = new.requires_grad_(True)
    (learned,) = torch.autograd.grad(student.loss(points, targets).sum(), points)
    true_loss = -victim(points).log().gather(1, targets[:, None]).sum()
    (true,) = torch.autograd.grad(true_loss, points)
    cosine = torch.nn.functional.cosine_similarity(learned.flatten(1), true.flatten(1)).median()
    assert cosine > 0.3
    assert student.loss(new, targets).mean() < student.loss(new, 1 - targets).mean()


def test_one_hot_answers_do_not_make_the_divergence_infinite():
    student = surrogate()
    student.observe(images(64), torch.eye(2).repeat(32, 1), "probabilities")
    assert student.values.rows()["answers"].min() > -10
    assert 0 < student.learn(3) < 20


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = surrogate()
    assert torch.equal(torch.rand(3), expected)
    second = surrogate()
    for student in (first, second):
        student.observe(images(64), victim(images(64)), "probabilities")
        student.learn(3)
    for mine, theirs in zip(first.network.state_dict().values(), second.network.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def segmenter(batch: Tensor) -> Tensor:
    """What is brighter than its surroundings."""
    around = torch.nn.functional.avg_pool2d(batch, 5, stride=1, padding=2)
    inside = (20 * (torch.nn.functional.avg_pool2d(batch, 3, stride=1, padding=1) - around)).sigmoid()
    return torch.cat([1 - inside, inside], dim=1)


def test_the_student_of_a_segmenter_learns_its_masks_and_their_gradient():
    student = Surrogate(SHAPE, 2, SurrogateSettings(), seed=0, device=CPU, positions=SHAPE[1:])
    seen = images(600)
    student.observe(seen, segmenter(seen), "probabilities")
    assert student.values.rows()["answers"].dtype == torch.uint8
    before = student.learn(1, from_scratch=True)
    assert student.learn(120, from_scratch=True) < 0.3 * before
    new = images(16, seed=1)
    targets = segmenter(new + 0.2 * torch.randn(new.shape, generator=torch.Generator().manual_seed(3))).argmax(1)
    points = new.requires_grad_(True)
    (learned,) = torch.autograd.grad(student.loss(points, targets).sum(), points)
    (true,) = torch.autograd.grad(stability_loss(segmenter(points), targets, "probabilities").sum(), points)
    assert torch.nn.functional.cosine_similarity(learned.flatten(1), true.flatten(1)).median() > 0.5
