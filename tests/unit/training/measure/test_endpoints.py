import pytest
import torch
from torch import Tensor

from training.command.errors import UserError
from training.measure.endpoints import Defended, Identity, identify

IMAGE = torch.zeros(1, 4, 4)


class Answering:
    def __init__(self, answer: dict[str, object], up: bool = True) -> None:
        self.answer, self.up = answer, up

    def __call__(self, images: Tensor) -> Tensor:
        raise AssertionError("identifying takes no tensors")

    def describe(self, _: Tensor) -> dict[str, object]:
        return self.answer

    def ready(self) -> bool:
        return self.up


def test_bare_victim_has_no_artifact_and_cost_no_queries() -> None:
    endpoint = Answering({"labels": ["a", "b"]})
    assert identify(endpoint, "http://v", IMAGE, ("a", "b")) == Identity(artifact=None, queries=0)


def test_gateway_tells_its_artifact_and_what_it_cost() -> None:
    endpoint = Answering({"labels": ["a", "b"], "artifact": {"id": "f00", "queries_spent": 123, "name": "n"}})
    assert identify(endpoint, "http://g", IMAGE, ("a", "b")) == Identity("f00", 123, "n")


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        (Answering({}, up=False), "nothing is ready at http://x"),
        (Answering({"labels": ["b", "a"]}), "knows the classes"),
        (Answering({"labels": ["a", "b"], "artifact": {"id": 5}}), "unknown form"),
    ],
)
def test_endpoint_that_does_not_fit_is_a_user_error(endpoint: Answering, message: str) -> None:
    with pytest.raises(UserError, match=message):
        identify(endpoint, "http://x", IMAGE, ("a", "b"))


def test_an_endpoint_behind_a_front_sees_what_the_front_makes() -> None:
    seen = []

    class Victim(Answering):
        def __call__(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)[:, :2]

    images = torch.rand(300, 1, 2, 2, requires_grad=True)
    defended = Defended(lambda part: part + 1, Victim({}), torch.device("cpu"))
    assert torch.equal(defended(images), (images + 1).flatten(1)[:, :2])
    assert torch.equal(torch.cat(seen), images + 1)
    assert not defended(images).requires_grad
