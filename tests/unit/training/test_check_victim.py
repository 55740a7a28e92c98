"""`check_victim`: what it finds out about toy victims, and what it says may help with broken ones."""

import json
import logging
from contextlib import nullcontext

import httpx
import pytest
import torch
from torch import Tensor
from zo_fakes import Endpoint, half_images, segment

from services.protocol.client import HTTPVictim
from services.protocol.errors import UpstreamInvalid
from training import check_victim as verb
from training.victim.check import QUERIES, check_victim

IMAGES = half_images(8, 0)
COMMON = ["--victim-url", "http://victim", "--size", "16"]


def run(victim, *flags: str) -> int:
    return verb.main([*COMMON, *flags], connect=lambda *_, **__: nullcontext(victim))


def http(answer) -> dict:
    """How a client with such a transport is made."""
    return {"connect": lambda urls, **options: HTTPVictim(urls, **options, transport=httpx.MockTransport(answer))}


def test_a_good_victim_is_described_at_the_price_that_was_stated(capsys):
    victim = Endpoint()
    assert run(victim) == 0
    told = capsys.readouterr().out
    assert f"about {QUERIES} images of 1 x 16 x 16" in told
    assert f"queries spent: {QUERIES}" in told
    assert victim.received == QUERIES
    assert "classes: 2 (left, right); a class an image" in told
    assert "scores: probabilities; noise floor" in told
    assert "every method can be used" in told
    expected = "training.zo_fit --victim-url http://victim --data phantom --size 16 --channels 1 --preset surrogate"
    assert expected in told


def test_a_function_is_a_victim():
    found = check_victim(Endpoint().__call__, IMAGES)
    assert (found.labels, found.positions, found.report.kind) == (["0", "1"], (), "probabilities")
    assert found.is_usable


def test_rounding_and_labels_are_told():
    exact = Endpoint()

    def soft(images: Tensor) -> Tensor:
        return (exact(images).log() / 4).softmax(1)

    rounded = check_victim(lambda images: (soft(images) * 100).round() / 100, IMAGES)
    assert any("rounded to 0.01" in line for line in rounded.lines())
    labels = check_victim(lambda images: torch.eye(2)[exact(images).argmax(1)], IMAGES)
    assert any("labels only" in line for line in labels.lines())


def test_logits_and_masks_are_told(capsys):
    logits = check_victim(lambda images: 7 * Endpoint()(images) - 9, IMAGES)
    assert logits.report.kind == "logits"
    victim = Endpoint()
    victim.answer = segment
    assert run(victim) == 0
    told = capsys.readouterr().out
    assert "a mask of 16 x 16" in told
    assert "--preset surrogate-dense --max-queries 16000" in told


def test_a_victim_that_always_answers_the_same_is_a_problem(capsys):
    victim = Endpoint()
    victim.answer = lambda images: torch.tensor([0.3, 0.7]).expand(len(images), -1)
    assert run(victim) == 1
    told = capsys.readouterr().out
    assert "PROBLEM: all images got the same answer" in told
    assert "next:" not in told


def test_an_answer_that_is_no_score_a_class_is_a_problem(capsys):
    victim = Endpoint()
    victim.answer = lambda images: torch.full((len(images), 1), 0.5)
    assert run(victim) == 1
    told = capsys.readouterr().out
    assert "scores of shape (1, 1)" in told
    assert "point a --victim-mapping to the scores" in told


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "it wants a key"), (403, "it wants a key"), (404, "nothing at this path"), (415, "try --wire image")],
)
def test_a_victim_that_refuses_is_told_with_what_may_help(capsys, status, hint):
    answer = http(lambda request: httpx.Response(status, json={"error": "no"}))
    assert verb.main([*COMMON, "--patience", "0.01"], **answer) == 1
    told = capsys.readouterr().out
    assert f"answered {status}" in told
    assert hint in told


def test_a_victim_that_is_away_is_told(capsys):
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    assert verb.main([*COMMON, "--patience", "0.01"], **http(away)) == 1
    told = capsys.readouterr().out
    assert "cannot be reached" in told
    assert "see that the service runs" in told
    assert logging.getLogger("services").isEnabledFor(logging.WARNING)  # the loggers are as they were


def test_a_mapping_that_points_elsewhere_is_told(capsys, tmp_path):
    mapping = tmp_path / "mapping.json"
    told = {"labels": ["a", "b"], "image": {"form": "file"}, "answer": {"scores": "nowhere"}}
    mapping.write_text(json.dumps(told))
    answer = http(lambda request: httpx.Response(200, json={"scores": [0.5, 0.5]}))
    assert verb.main([*COMMON, "--victim-mapping", str(mapping)], **answer) == 1
    assert "--victim-mapping says where" in capsys.readouterr().out


def test_images_of_a_folder_are_read_without_reading_all(tmp_path, capsys):
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number, image in enumerate(half_images(30, seed=ord(label))):
            path = tmp_path / label / f"{number:02}.png"
            Image.fromarray((image[0] * 255).byte().numpy()).save(path)
    (tmp_path / "a" / "01.png").write_bytes(b"broken, and not among those that are read")
    victim = Endpoint()
    assert run(victim, "--data", str(tmp_path)) == 0
    assert f"--data {tmp_path}" in capsys.readouterr().out


def test_names_that_it_refuses_to_tell_are_no_problem():
    victim = Endpoint()
    victim.refuses_images = True
    assert check_victim(victim, IMAGES).labels is None


def test_errors_of_learning_are_not_swallowed():
    def broken(images: Tensor) -> Tensor:
        raise UpstreamInvalid("nonsense")

    with pytest.raises(UpstreamInvalid):
        check_victim(broken, IMAGES)
