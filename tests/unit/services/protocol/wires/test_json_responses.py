import base64
import json
from typing import Any

import numpy as np
import pytest

from services.protocol.errors import UpstreamInvalid
from services.protocol.mapping import Answer
from services.protocol.masks import encode_mask
from services.protocol.wires.base import Scored
from services.protocol.wires.image import OWN_ANSWER
from services.protocol.wires.json_responses import read_response


def masked(classes: np.ndarray, count: int = 2) -> str:
    """The mask of these classes (H,W), as it stands in JSON."""
    return base64.b64encode(encode_mask(classes.astype(np.uint8), count)).decode()


def read(content: bytes, size: tuple[int, int] = (4, 4)) -> Scored:
    """An answer in this project's form."""
    return read_response(content, OWN_ANSWER, None, size=size)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "no JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "no probabilities, mask or label, but nothing"),
        (b'{"score": 1}', "but 'score'"),
        (b'{"mask": null}', "no probabilities, mask or label, but 'mask'"),
        (b'{"label": "a"}', "is the label 'a' alone.* in `labels`"),
        (b'{"label": "a", "labels": ["b", "c"]}', "none of its `labels`"),
        (b'{"label": "a", "labels": ["a"]}', "two or more different"),
        (b'{"label": "a", "labels": ["a", "a"]}', "two or more different"),
        (b'{"label": "a", "labels": "ab"}', "no list of names"),
        (b'{"labels": ["a", "b"], "probabilities": [1, 0, 0]}', "3 probabilities for 2 labels"),
        (b'{"probabilities": {"a": 1}}', "score 'a', the classes are 'a': let it score each class, and two"),
        (b'{"labels": ["a", "b"], "probabilities": {"a": 1, "c": 0}}', "score 'a', 'c', the classes are 'a', 'b'"),
        (b'{"probabilities": {"a": 1, "b": "0"}}', "no list of numbers"),
        (b'{"probabilities": 1.5}', "no list of numbers"),
        (b'{"probabilities": true}', "no list of numbers"),
        (b'{"probabilities": [{"label": "a", "score": 1}, {"label": "b"}]}', "no objects with 'label' and 'score'"),
        (b'{"probabilities": [{"label": "a", "score": 1}, {"label": "a", "score": 0}]}', "a label twice"),
        (b'{"labels": ["a", "b"], "label": 2}', "label '2' is none of its"),
        (b'{"labels": ["a", "b"], "label": -1}', "label '-1' is none of its"),
        (b'{"labels": ["a", "b"], "label": true}', "neither a label nor its number"),
        (b'{"labels": ["a", "b"], "label": ["a"]}', "neither a label nor its number"),
        (b'{"probabilities": []}', "no list of numbers"),
        (b'{"probabilities": ["1", "0"]}', "no list of numbers"),
        (b'{"probabilities": [true, false]}', "no list of numbers"),
        (b'{"probabilities": [NaN, 0]}', "not finite"),
        (b'{"probabilities": [1e300, 0]}', "not finite"),
        (b'{"probabilities": [1' + 400 * b"0" + b", 0]}", "not finite"),
    ],
)
def test_what_is_no_answer_to_an_image_is_refused_in_words(answer: bytes, message: str) -> None:
    with pytest.raises(UpstreamInvalid, match=message):
        read(answer)


def test_probabilities_need_no_labels_and_outrank_a_mask_which_outranks_a_label() -> None:
    def told(**answer: Any) -> tuple[list[float], tuple[str, ...] | None]:
        one = read_response(json.dumps(answer).encode(), OWN_ANSWER, None, size=(1, 2))
        return one.scores[0].tolist(), one.labels

    assert told(probabilities=[0.25, 0.75]) == ([0.25, 0.75], None)
    every = {"label": "a", "labels": ["a", "b"], "mask": masked(np.array([[0, 1]])), "probabilities": [0.25, 0.75]}
    assert told(**every) == ([0.25, 0.75], ("a", "b"))
    every["probabilities"] = None
    assert told(**every) == ([[[1.0, 0.0]], [[0.0, 1.0]]], ("a", "b"))
    every["mask"] = None
    assert told(**every) == ([1.0, 0.0], ("a", "b"))


@pytest.mark.parametrize("count", [2, 3])
def test_a_mask_becomes_one_hot_at_every_pixel(count: int) -> None:
    classes = np.random.default_rng(0).integers(0, count, (5, 7))
    labels = ["background", "polyp", "tool"][:count]
    content = json.dumps({"labels": labels, "lesion_fraction": 0.5, "mask": masked(classes, count)}).encode()
    one = read(content, size=(5, 7))
    assert one.labels == tuple(labels)
    assert one.scores.dtype == np.float32
    assert np.array_equal(one.scores[0], np.eye(count)[classes].transpose(2, 0, 1))


HEAD = '{"labels": ["a", "b"], "mask": '


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('{"mask": "aaaa"}', "a mask whose classes are unknown.* in `labels`"),
        ('{"mask": "aaaa", "labels": ["a"]}', "two or more different"),
        (HEAD + "1}", "`mask` is no PNG in base64"),
        (HEAD + "[[0, 1]]}", r"height and width \(4, 4\) with scores of shape"),
        (HEAD + "[[0, 1], [0]]}", "lists of different lengths"),
        (HEAD + '[["0", "1"]]}', "no lists of numbers"),
        (HEAD + "[[true, false]]}", "no lists of numbers"),
        (HEAD + "[0, 1]}", "no lists of numbers"),
        (f"{HEAD}{[[0.5] * 4] * 3 + [[0.5, 0.5, 0.5, 2]]}}}", r"scores between 0.5 and 2.*in \[0,1\]"),
        (f"{HEAD}{[[[0.5] * 4] * 4] * 3}}}", "scores of 3 classes, for 2 labels"),
        (HEAD + '"data:image/png;base64,aaaa"}', "`mask` is no base64"),
        (HEAD + '"aaa"}', "`mask` is no base64"),
        (HEAD + '"\u00e4\u00e4\u00e4\u00e4"}', "`mask` is no base64"),
        (HEAD + '""}', "the mask is empty"),
        (HEAD + '"aaaa"}', "the mask is no PNG"),
        (f'{HEAD}"{masked(np.zeros((4, 5), int))}"}}', "the mask has 5 x 4 pixels; at most 16"),
        (f'{HEAD}"{masked(np.zeros((3, 4), int))}"}}', "the mask has 4 x 3 pixels, the image 4 x 4"),
        (f'{HEAD}"{masked(np.ones((4, 4), int), 3)}"}}', "the value 128"),
    ],
)
def test_what_is_no_mask_of_the_image_is_refused_in_words(answer: str, message: str) -> None:
    with pytest.raises(UpstreamInvalid, match=message) as caught:
        read(answer.encode())
    assert type(caught.value) is UpstreamInvalid


def mapped(content: Any, known: tuple[str, ...] | None = None, **where: str) -> tuple[Any, tuple[str, ...] | None]:
    told = read_response(json.dumps(content).encode(), Answer(**where), known, size=(2, 3))
    assert told.scores.dtype == np.float32
    assert len(told.scores) == 1
    return told.scores[0].tolist(), told.labels


def test_scores_are_found_by_their_path() -> None:
    scores = [0.25, 0.75]
    for content, path in (
        ({"predictions": [{"p": scores}]}, "predictions.0.p"),
        ({"predictions": [{"p": scores}]}, "/predictions/0/p"),
        ({"a.b": {"c/d": {"e~f": scores}}}, "/a.b/c~1d/e~0f"),
        ({"0": scores}, "0"),
        ([[1], scores], "1"),
        (scores, ""),
        ({"": scores}, "/"),
    ):
        assert mapped(content, scores=path) == (scores, None)
        assert mapped(content, ("x", "y"), scores=path) == (scores, ("x", "y"))


@pytest.mark.parametrize("path", ["predictions.1.p", "predictions.-1.p", "predictions.p", "p", "predictions.0.p.0.0"])
def test_a_path_that_leads_nowhere_is_told(path: str) -> None:
    with pytest.raises(UpstreamInvalid, match=f"has no {path}, but 'predictions'"):
        mapped({"predictions": [{"p": [0.25, 0.75]}]}, scores=path)
    with pytest.raises(UpstreamInvalid, match="it is no JSON object"):
        mapped([0.25, 0.75], scores=path)


def test_labels_and_numbers_in_pairs_keep_the_order_of_the_labels_whatever_their_own() -> None:
    pairs = {"b": 0.75, "a": 0.25}
    entries = [{"label": name, "score": score} for name, score in pairs.items()]
    renamed = [{"class": name, "p": score} for name, score in pairs.items()]
    for content, where in ((pairs, {}), (entries, {}), (renamed, {"entry_label": "class", "entry_score": "p"})):
        assert mapped(content, scores="", **where) == ([0.25, 0.75], ("a", "b"))
        assert mapped(content, ("b", "a"), scores="", **where) == ([0.75, 0.25], ("b", "a"))
        with pytest.raises(UpstreamInvalid, match="the classes are 'a', 'b', 'c'"):
            mapped(content, ("a", "b", "c"), scores="", **where)


def test_a_lone_probability_is_that_of_the_second_class() -> None:
    assert mapped({"malignant": 0.75}, scores="malignant") == ([0.25, 0.75], None)
    assert mapped({"malignant": 1}, ("no", "yes"), scores="malignant") == ([0, 1], ("no", "yes"))
    with pytest.raises(UpstreamInvalid, match="2 malignant for 3 labels"):
        mapped({"malignant": 0.75}, ("a", "b", "c"), scores="malignant")


@pytest.mark.parametrize("label", ["b", 1])
def test_a_label_or_its_number_needs_the_names_of_a_mapping(label: str | int) -> None:
    assert mapped({"class": label}, ("a", "b", "c"), label="class") == ([0, 1, 0], ("a", "b", "c"))
    with pytest.raises(UpstreamInvalid, match=r"is the label .* alone.* in a mapping file, as `labels`"):
        mapped({"class": label}, label="class")


def test_the_answers_own_labels_outrank_those_of_the_mapping() -> None:
    content = {"names": ["x", "y"], "class": 1}
    assert mapped(content, ("a", "b"), label="class", labels="names") == ([0, 1], ("x", "y"))
    assert mapped({"class": 1}, ("a", "b"), label="class", labels="names") == ([0, 1], ("a", "b"))


def test_nested_lists_are_probabilities_of_the_foreground_or_scores_of_all_classes() -> None:
    plane = [[0.0, 0.25, 1.0], [0.5, 0.75, 0.0]]
    rest = [[1.0, 0.75, 0.0], [0.5, 0.25, 1.0]]
    for content in (plane, [plane], [rest, plane]):
        assert mapped({"mask": content}, mask="mask") == ([rest, plane], None)
    assert mapped({"mask": [[0, 1, 1], [1, 0, 0]]}, ("a", "b"), mask="mask")[0][1] == [[0, 1, 1], [1, 0, 0]]
    logits = [[[-3.0, 4.0, 5.0], [1.0, 2.0, 3.0]]] * 3
    assert mapped({"mask": logits}, ("a", "b", "c"), mask="mask") == (logits, ("a", "b", "c"))


def test_a_mask_in_a_file_takes_its_classes_from_the_mapping() -> None:
    classes = np.array([[0, 1, 1], [1, 0, 0]])
    scores, labels = mapped({"result": {"png": masked(classes)}}, ("no", "yes"), mask="result.png")
    assert np.array_equal(np.array(scores).argmax(0), classes)
    assert labels == ("no", "yes")


def test_the_whole_answer_has_a_name_in_messages() -> None:
    with pytest.raises(UpstreamInvalid, match="the victim's `answer` are no list of numbers"):
        mapped(["0.5", "0.5"], scores="")
    with pytest.raises(UpstreamInvalid, match="has no answer: it is no JSON object"):
        mapped(None, scores="")
