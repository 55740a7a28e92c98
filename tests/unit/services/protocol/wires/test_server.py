from typing import Any

import httpx
import numpy as np
import pytest

from services.protocol import oip
from services.protocol.errors import InvalidInput, ServiceError, Unsupported, UpstreamInvalid
from services.protocol.mapping import TensorOptions
from services.protocol.wires.server import BINARY_EXTENSION, ServerWire

URL = "http://server/v2/models/m"
IMAGES = np.random.default_rng(0).random((2, 3, 4, 6), dtype=np.float32)
BINARY = {"name": "s", "extensions": ["classification", BINARY_EXTENSION]}
TRITON: dict[str, Any] = {
    "name": "m",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 4, 6]}],
    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}],
}


def wire(
    server: object = BINARY,
    labels: tuple[str, ...] | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> ServerWire:
    return ServerWire.from_metadata(URL, {**TRITON, **changes}, server, TensorOptions(**(options or {})), labels)


def takes(**changes: Any) -> list[dict[str, Any]]:
    return [{**TRITON["inputs"][0], **changes}]


def encoded(made: ServerWire, images: np.ndarray = IMAGES) -> tuple[oip.Request, httpx.Request]:
    """What a server would read."""
    body, headers = made.encode(images)
    request = httpx.Request("POST", "http://server", content=body, headers=headers)
    return oip.decode_request(body, oip.header_length(request.headers.get(oip.HEADER))), request


def answer(**outputs: np.ndarray) -> httpx.Response:
    body, headers = oip.encode_response(
        [(oip.Tensor(name, array), True) for name, array in outputs.items()], model_name="m", model_version="1"
    )
    return httpx.Response(200, content=body, headers=headers)


def test_names_and_datatypes_are_those_of_the_metadata() -> None:
    request, _ = encoded(wire())
    assert request.inputs[0].name == "x"
    assert request.inputs[0].datatype == "FP32"
    assert np.array_equal(request.inputs[0].array, IMAGES)
    assert request.outputs == {"scores": True}
    for datatype in ("FP16", "FP64"):
        sent = encoded(wire(inputs=takes(datatype=datatype)))[0].inputs[0]
        assert sent.datatype == datatype
        assert np.allclose(sent.array, IMAGES, atol=1e-3)


def test_a_server_that_does_not_say_that_it_reads_binary_gets_plain_json() -> None:
    for server in (None, [], {"name": "s"}, {"extensions": None}, {"extensions": ["model_repository_extension"]}):
        request, sent = encoded(wire(server))
        assert sent.headers["Content-Type"] == "application/json"
        assert np.array_equal(request.inputs[0].array, IMAGES)
        assert request.outputs == {"scores": False}
        assert b"binary" not in sent.content
    assert encoded(wire(None, options={"encoding": "binary"}))[1].headers["Content-Type"] == "application/octet-stream"
    assert encoded(wire(options={"encoding": "json"}))[1].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("nothing", [None, []])
def test_metadata_may_say_nothing_of_the_tensors(nothing: Any) -> None:
    for server in (BINARY, None):
        request, _ = encoded(wire(server, inputs=nothing, outputs=nothing))
        assert request.inputs[0].name == "images"
        assert request.outputs == {}
        assert request.binary_default is (server is BINARY)
    options = {"input": "x", "output": "y", "datatype": "FP64"}
    request, _ = encoded(wire(inputs=nothing, outputs=nothing, options=options))
    assert (request.inputs[0].name, request.inputs[0].datatype, request.outputs) == ("x", "FP64", {"y": True})
    assert encoded(wire(inputs=[{"name": "x"}]))[0].inputs[0].name == "x"


def test_sides_that_any_size_will_do_for_are_not_checked() -> None:
    for shape in ([-1, 3, -1, -1], [-1, -1, -1, -1], [-1, 3, 4, -1]):
        assert len(encoded(wire(inputs=takes(shape=shape)))[0].inputs[0].array) == 2


@pytest.mark.parametrize(
    ("first", "batch", "largest"), [(-1, None, None), (-1, 8, 8), (1, None, 1), (1, 8, 1), (0, None, None)]
)
def test_the_batch_is_bounded_by_the_shape_and_by_the_mapping(first: int, batch: int | None, largest: int) -> None:
    assert wire(inputs=takes(shape=[first, 3, 4, 6]), options={"batch": batch}).largest == largest


MASKS = {"name": "mask", "datatype": "FP32", "shape": [-1, 1, 4, 6]}
REFUSED: dict[str, tuple[dict[str, Any], type[ServiceError], str]] = {
    "two inputs": (
        {"inputs": [*takes(), {"name": "age", "datatype": "FP32", "shape": [-1, 1]}]},
        Unsupported,
        r"takes 2 inputs, 'x' \(FP32 \[-1, 3, 4, 6\]\), 'age' \(FP32 \[-1, 1\]\): only images are sent",
    ),
    "integers": ({"inputs": takes(datatype="UINT8")}, Unsupported, "takes UINT8 tensors.*FP16, FP32, FP64"),
    "texts": ({"inputs": takes(datatype="BYTES")}, Unsupported, "takes BYTES tensors"),
    "half in json": (
        {"inputs": takes(datatype="FP16"), "server": None},
        Unsupported,
        'FP16 tensors, which JSON cannot carry.*encoding = "binary"',
    ),
    "a fixed batch": ({"inputs": takes(shape=[8, 3, 4, 6])}, Unsupported, "exactly 8 images a request.*variable batch"),
    "no batch": ({"inputs": takes(shape=[3, 4, 6])}, Unsupported, r"tensors of shape \[3, 4, 6\]: images are sent as"),
    "no shape": ({"inputs": takes(shape="any")}, UpstreamInvalid, "'any' is no shape"),
    "another input": ({"options": {"input": "y"}}, InvalidInput, r"no input 'y', but 'x' \(FP32"),
    "two outputs": (
        {"outputs": [*TRITON["outputs"], MASKS]},
        InvalidInput,
        r"the outputs 'scores', 'mask': say in a mapping file.*\[tensor\] output",
    ),
    "another output": ({"options": {"output": "y"}}, InvalidInput, "no output 'y', but 'scores'"),
    "nameless tensors": ({"inputs": [{"datatype": "FP32"}]}, UpstreamInvalid, "no metadata of a model: 'inputs'"),
    "no list": ({"outputs": {"scores": "FP32"}}, UpstreamInvalid, "no metadata of a model: 'outputs'"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_sent_is_refused_in_words(how: str) -> None:
    changes, kind, words = REFUSED[how]
    with pytest.raises(kind, match=words) as caught:
        wire(**changes)
    assert type(caught.value) is kind
    assert URL in caught.value.message


@pytest.mark.parametrize("metadata", [None, [], "x"])
def test_what_is_no_metadata_is_refused(metadata: Any) -> None:
    with pytest.raises(UpstreamInvalid, match="no metadata of a model"):
        ServerWire.from_metadata(URL, metadata, BINARY, TensorOptions(), None)


@pytest.mark.parametrize("shape", [[-1, 4, 6, 3], [-1, -1, -1, 3]])
def test_channels_last_are_told_from_another_size(shape: list[int]) -> None:
    with pytest.raises(Unsupported, match=r"channels last.*serve it with channels first"):
        wire(inputs=takes(shape=shape)).encode(IMAGES)


@pytest.mark.parametrize("shape", [[-1, 1, 4, 6], [-1, 3, 8, 6], [-1, 6, 4, 3]])
def test_images_of_another_size_are_refused_before_they_are_sent(shape: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"these are \[N, 3, 4, 6\].*--size, --channels"):
        wire(inputs=takes(shape=shape)).encode(IMAGES)


SCORES = np.array([[0.25, 0.75], [1, 0]], np.float32)


def test_of_several_outputs_the_one_that_was_asked_for_is_read() -> None:
    outputs = [*TRITON["outputs"], MASKS]
    planes = IMAGES[:, :1]
    both = answer(scores=SCORES, mask=planes)
    chosen = wire(outputs=outputs, options={"output": "scores"}).read(both, IMAGES.shape)
    assert np.array_equal(chosen.scores, SCORES)
    masks = wire(outputs=outputs, options={"output": "mask"}).read(both, IMAGES.shape)
    assert np.array_equal(masks.scores, np.concatenate([1 - planes, planes], axis=1))
    ours = [*TRITON["outputs"], {"name": "probabilities"}]
    assert encoded(wire(outputs=ours))[0].outputs == {"probabilities": True}
    with pytest.raises(UpstreamInvalid, match="no output 'scores', but others"):
        wire().read(answer(other=SCORES), IMAGES.shape)


def test_labels_of_the_mapping_name_the_scores_and_have_to_fit() -> None:
    assert wire().read(answer(scores=SCORES), IMAGES.shape).labels is None
    assert wire(labels=("a", "b")).read(answer(scores=SCORES), IMAGES.shape).labels == ("a", "b")
    with pytest.raises(UpstreamInvalid, match="2 classes, for 3 labels"):
        wire(labels=("a", "b", "c")).read(answer(scores=SCORES), IMAGES.shape)


def test_an_image_is_described_by_its_scores() -> None:
    one = IMAGES[0]
    assert wire().encode_question(one) == wire().encode(one[None])
    told = wire().read_description(answer(scores=SCORES[:1]), one.shape)
    assert told == {"label": "1", "labels": ["0", "1"], "probabilities": [0.25, 0.75]}
    told = wire(labels=("a", "b")).read_description(answer(scores=SCORES[:1]), one.shape)
    assert (told["label"], told["labels"]) == ("b", ["a", "b"])
