"""The attacker without weights: what it finds by answers alone, what it spends, and how it ends when refused."""

import pytest
import torch
from torch import Tensor
from toy_defense import SIDE, Brighter, splits

from defense.corruptions import CORRUPTIONS
from services.protocol.errors import Overloaded
from training.attack.outsider import Outsider
from training.command.errors import UserError


class Service:
    """Answers probabilities, for so many images."""

    def __init__(self, whole: bool, limit: int | None = None) -> None:
        self.model, self.limit, self.images = Brighter(whole).eval(), limit, 0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.limit is not None and self.images + len(images) > self.limit:
            raise Overloaded("many near-identical images", retry_after=600)
        self.images += len(images)
        return self.model(images).softmax(1)

    def describe(self, image: Tensor) -> dict[str, object]:
        raise NotImplementedError

    def ready(self) -> bool:
        return True


def outsider(service: Service, **changed: int) -> Outsider:
    data = splits(service.model.whole)
    settings = {"queries": 150, "student_queries": 60, "student_steps": 30, "steps": 5, "seed": 0, **changed}
    part = data.validation
    return Outsider(service, part.images, part.labels, data.train.images, device=torch.device("cpu"), **settings)


@pytest.mark.parametrize("whole", [True, False])
def test_what_it_spends_is_what_the_gateway_answers(whole: bool) -> None:
    service = Service(whole)
    attacker = outsider(service)
    assert attacker.clean().eq(1).all()
    linf, l2 = attacker.attacked("linf", 0.05), attacker.attacked("l2", 2.0)
    assert set(linf) == {"square", "student"}
    assert set(l2) == {"hopskipjump", "student"}
    assert len(attacker.corrupted()) == 3 * len(CORRUPTIONS)
    assert sum(attacker.spent.values()) == service.images
    assert set(attacker.spent) == {"clean", "square", "student", "transfer", "hopskipjump", "corruptions"}
    assert attacker.spent["square"] <= 6 * 150
    assert attacker.spent["student"] == 60
    assert attacker.spent["transfer"] == 2 * 6
    assert attacker.refused is None


def test_nothing_is_lost_within_the_margin() -> None:
    attacker = outsider(Service(True))
    margins = (splits(True).validation.images.mean((1, 2, 3)) - 0.5).abs()
    for epsilon in (0.001, 0.01, 0.5):
        found = attacker.attacked("linf", epsilon)
        assert found["square"][margins > epsilon].eq(1).all()
    assert found["square"].eq(0).all()
    lengths = attacker.smallest()
    assert (lengths >= margins * SIDE - 1e-4).all()
    far = attacker.attacked("l2", float(lengths[lengths.isfinite()].max()))["hopskipjump"]
    assert far[lengths.isfinite()].eq(0).all()
    assert attacker.attacked("l2", 0.0)["hopskipjump"].eq(1).all()


def test_sizes_add_up_so_that_a_larger_one_is_never_weaker() -> None:
    attacker = outsider(Service(False), queries=20)
    scores = [float(attacker.attacked("linf", size)["square"].mean()) for size in (0.02, 0.1, 0.2)]
    assert 1 > scores[0] > scores[1] > scores[2]


def test_a_taught_student_shows_the_way() -> None:
    attacker = outsider(Service(True), student_queries=600, student_steps=150, steps=20)
    margins = (splits(True).validation.images.mean((1, 2, 3)) - 0.5).abs()
    found = attacker.attacked("linf", 4 * float(margins.max()))
    assert found["student"].mean() < 0.5
    assert "student" not in outsider(Service(True), student_queries=0).attacked("linf", 0.1)


@pytest.mark.parametrize("limit", [6, 40, 200, 700])
def test_a_gateway_that_refuses_ends_the_attacks_and_loses_nothing(limit: int) -> None:
    service = Service(True, limit)
    attacker = outsider(service)
    found = attacker.attacked("linf", 0.2)
    attacker.attacked("l2", 1.0)
    attacker.smallest()
    attacker.corrupted()
    assert attacker.refused == "many near-identical images"
    assert service.images <= limit
    assert found["square"].shape == (6,)
    assert attacker.clean().eq(1).all()


def test_a_gateway_that_answers_nothing_is_told() -> None:
    with pytest.raises(UserError, match="refuses to answer the first 6 images: many near-identical"):
        outsider(Service(True, 0))


def test_one_class_alone_leaves_the_walk_without_a_start() -> None:
    service = Service(True)
    data = splits(True)
    same = data.validation.images[data.validation.labels == data.validation.labels[0]]
    labels = service.model(same).argmax(1)
    attacker = Outsider(
        service,
        same,
        labels,
        data.train.images,
        queries=50,
        student_queries=0,
        student_steps=1,
        steps=1,
        seed=0,
        device=torch.device("cpu"),
    )
    assert attacker.smallest().isinf().all()
    assert "hopskipjump" not in attacker.spent
