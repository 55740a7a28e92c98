import argparse
from collections import Counter

import pytest
import torch
from torch import Tensor

from training.cli import UserError
from training.measuring import Identity, defence_name, identify, number_list, stratified_order

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
    assert identify(endpoint, "http://g", IMAGE, ("a", "b")) == Identity(artifact="f00", queries=123)


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


def test_order_keeps_the_classes_proportions_in_every_beginning() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    for limit in (10, 20, 50, 100):
        counts = Counter(labels[stratified_order(labels, limit, seed=3)].tolist())
        for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
            assert abs(counts[label] - share * limit) <= 1


def test_order_is_deterministic_and_a_smaller_limit_is_its_beginning() -> None:
    labels = torch.arange(40) % 4
    whole = stratified_order(labels, None, seed=1)
    assert sorted(whole) == list(range(40))
    assert stratified_order(labels, 7, seed=1) == whole[:7]
    assert stratified_order(labels, 400, seed=1) == whole
    assert stratified_order(labels, None, seed=2) != whole


@pytest.mark.parametrize("text", ["", "a/b", "../x", "a b", ".hidden"])
def test_defence_names_are_safe_file_names(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        defence_name(text)


def test_number_list_drops_repetitions() -> None:
    assert number_list("0,0.5,2,0.5") == [0.0, 0.5, 2.0]


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "nan", "inf", "x"])
def test_number_list_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        number_list(text)
