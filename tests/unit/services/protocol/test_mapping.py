import json
import re
from pathlib import Path
from typing import Any

import pytest

from services.protocol import mapping
from services.protocol.errors import InvalidInput
from services.protocol.mapping import Mapping, load_mapping, split_path

TOML = """
labels = ["no", "yes"]
health = "/healthz"

[headers]
Authorization = "Bearer ${TOKEN}"
X-Both = "${A}-${B}"

[image]
json = { instances = [{ b64 = "{image}" }] }

[answer]
scores = "predictions.0"
"""


def written(folder: Path, text: str, name: str = "victim.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TOKEN", "s3cret\n"), ("A", "1"), ("B", "2")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_file_says_how_a_victim_is_asked_and_the_environment_its_secrets(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, TOML)
    if kind == "json":
        content = {
            "labels": ["no", "yes"],
            "health": "/healthz",
            "headers": {"Authorization": "Bearer ${TOKEN}", "X-Both": "${A}-${B}"},
            "image": {"json": {"instances": [{"b64": "{image}"}]}},
            "answer": {"scores": "predictions.0"},
        }
        path = written(tmp_path, json.dumps(content), "victim.json")
    told = load_mapping(path)
    assert told is not None
    assert told.labels == ("no", "yes")
    assert told.health == "/healthz"
    assert told.plain_headers() == {"Authorization": "Bearer s3cret", "X-Both": "1-2"}
    assert told.image is not None
    assert told.image.template == {"instances": [{"b64": "{image}"}]}
    assert told.answer is not None
    assert told.answer.scores == "predictions.0"
    assert told.tensor is None
    assert "s3cret" not in f"{told!r} {told} {told.model_dump_json()}"


def test_the_example_of_the_documentation_is_read_but_for_its_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSPITAL_TOKEN", "x")
    assert mapping.__doc__ is not None
    lines = [line.strip() for line in mapping.__doc__.splitlines() if line.startswith("    ")]
    images, _, tensors = "\n".join(lines).partition("[tensor]")
    one = "\n".join(line for line in images.splitlines() if not line.startswith(("form", "body")))
    told = load_mapping(written(tmp_path, one))
    assert told is not None
    assert told.image is not None
    assert told.answer is not None
    assert (told.answer.scores, told.answer.mask, told.answer.label) == ("predictions.0.scores", "mask", "class")
    told = load_mapping(written(tmp_path, f"[tensor]\n{tensors}"))
    assert told is not None
    assert told.tensor is not None
    assert told.tensor.model_dump() == {
        "input": "images",
        "output": "scores",
        "datatype": "FP32",
        "encoding": "binary",
        "batch": 8,
    }


def test_the_examples_of_the_documents_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSPITAL_TOKEN", "x")
    text = (Path(__file__).parents[4] / "docs" / "victims.md").read_text()
    server, endpoint = (
        load_mapping(written(tmp_path, block)) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    )
    assert server is not None
    assert server.tensor is not None
    assert (server.tensor.output, server.tensor.batch) == ("scores", 8)
    assert endpoint is not None
    assert endpoint.plain_headers() == {"Authorization": "Bearer x"}
    assert endpoint.image is not None


SENT: dict[str, Any] = {"image": {"form": "file"}, "answer": {"scores": "p"}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"label": ["a", "b"]}, "label: Extra inputs"),
        ({"labels": ["a"]}, "two or more different names"),
        ({"labels": ["a", "a"]}, "two or more different names"),
        ({"health": "healthz"}, "health: "),
        ({"image": {"form": "file"}}, r"\[image\] and \[answer\] belong together"),
        ({"answer": {"scores": "p"}}, r"\[image\] and \[answer\] belong together"),
        ({**SENT, "tensor": {"batch": 1}}, r"give \[image\] or \[tensor\]"),
        ({**SENT, "image": {}}, "exactly one of form, body and json"),
        ({**SENT, "image": {"form": "f", "body": "image/png"}}, "exactly one of form, body and json"),
        ({**SENT, "image": {"form": 'f"; x="'}}, "image.form: "),
        ({**SENT, "image": {"body": "png"}}, "image.body: "),
        ({**SENT, "image": {"json": {"a": "b"}}}, "no text in json holds {image}"),
        ({**SENT, "image": {"json": {"{image}": 1}}}, "no text in json holds {image}"),
        ({**SENT, "answer": {}}, "where the scores, the mask or the label is"),
        ({**SENT, "answer": {"labels": "l"}}, "where the scores, the mask or the label is"),
        ({**SENT, "answer": {"scores": "a..b"}}, "between its dots"),
        ({"tensor": {"datatype": "UINT8"}}, "tensor.datatype: "),
        ({"tensor": {"batch": 0}}, "tensor.batch: "),
        ({"tensor": {"encoding": "base64"}}, "tensor.encoding: "),
        ({"headers": "x"}, "headers: "),
        ({"headers": {"X-Key": 1}}, "X-Key must be a text"),
        ({"headers": {"X Key": "v"}}, "'X Key' is no name of a header"),
        ({"headers": {"content-type": "v"}}, "content-type says how images are sent"),
        ({"headers": {"X-Key": "${NOT_SET_ANYWHERE}"}}, "the environment variable NOT_SET_ANYWHERE, which is not set"),
        ([], "wrong"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path: Path, content: Any, words: str) -> None:
    path = written(tmp_path, json.dumps(content), "victim.json")
    with pytest.raises(InvalidInput, match=words) as caught:
        load_mapping(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        load_mapping(tmp_path / "none.toml")
    with pytest.raises(InvalidInput, match="is no TOML"):
        load_mapping(written(tmp_path, "{}"))
    with pytest.raises(InvalidInput, match="is no JSON"):
        load_mapping(written(tmp_path, TOML, "victim.json"))


@pytest.mark.parametrize("secret", ["s3cret\r\nX-Other: 1", "s3cret\x00", "s3crét"])
def test_no_message_tells_a_header(tmp_path: Path, secret: str) -> None:
    for headers in ({"X-Key": secret}, {"X-Key": {"value": secret}}, {"X-Key": "fine", "X-Other": secret}):
        content = {"headers": headers, "unknown": 1}
        with pytest.raises(InvalidInput) as caught:
            load_mapping(written(tmp_path, json.dumps(content), "victim.json"))
        assert "s3cr" not in caught.value.message
        assert caught.value.__suppress_context__  # the cause holds what was read


def test_paths_are_dotted_or_pointers() -> None:
    assert split_path("") == ()
    assert split_path("a.0.b") == ("a", "0", "b")
    assert split_path("/a.b/0/~1~0") == ("a.b", "0", "/~")


def test_nothing_is_needed() -> None:
    assert Mapping().plain_headers() == {}
    assert load_mapping(None) is None
