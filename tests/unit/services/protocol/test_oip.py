import json
from typing import Any

import numpy as np
import pytest

from services.protocol import oip
from services.protocol.datatypes import DTYPES
from services.protocol.errors import InvalidInput, Unsupported

NUMBERS = {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 4e2]}


def body(*inputs: dict[str, Any], tail: bytes = b"", **more: Any) -> tuple[bytes, int]:
    text = json.dumps({"inputs": list(inputs), **more}).encode()
    return text + tail, len(text)


def binary(size: int, **changes: Any) -> dict[str, Any]:
    entry = {"name": "x", "shape": [2, 2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return {**entry, **changes}


def decode(*inputs: dict[str, Any], **more: Any) -> oip.Request:
    return oip.decode_request(body(*inputs, **more)[0], None)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_round_trips_in_binary(datatype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[datatype])
    message, headers = oip.encode_request([oip.Tensor("x", array), oip.Tensor("y", array[:1])])
    request = oip.decode_request(message, oip.header_length(headers[oip.HEADER]))
    assert [tensor.name for tensor in request.inputs] == ["x", "y"]
    for tensor, sent in zip(request.inputs, (array, array[:1]), strict=True):
        assert tensor.datatype == datatype
        assert np.array_equal(tensor.array, sent)
    assert request.wanted(["scores"]) == {"scores": True}


@pytest.mark.parametrize("datatype", sorted(set(DTYPES) - {"FP16"}))
def test_every_datatype_but_fp16_round_trips_in_json(datatype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(DTYPES[datatype])
    message, headers = oip.encode_response([(oip.Tensor("y", array), False)], model_name="m", model_version="1")
    assert headers == {"Content-Type": "application/json"}
    decoded = oip.decode_response(message, None)["y"]
    assert decoded.dtype == array.dtype
    assert np.array_equal(decoded, array)


def test_a_request_in_json_mentions_nothing_of_binary_data() -> None:
    array = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    for output in (None, "y"):
        message, headers = oip.encode_request(
            [oip.Tensor("x", array)], binary=False, binary_output=False, output=output
        )
        assert headers == {"Content-Type": "application/json"}
        assert b"binary" not in message
        request = oip.decode_request(message, None)
        assert np.array_equal(request.inputs[0].array, array)
        assert request.outputs == ({} if output is None else {"y": False})


def test_a_request_may_ask_for_one_output_by_name() -> None:
    message, headers = oip.encode_request([oip.Tensor("x", np.ones(2, np.float32))], output="y")
    assert oip.decode_request(message, oip.header_length(headers[oip.HEADER])).wanted(("y",))["y"]


@pytest.mark.parametrize("binary", [True, False])
def test_outputs_that_nobody_asked_for_are_passed_over_whatever_they_are(binary: bool) -> None:
    arrays = {name: np.full((2, 2), number, np.float32) for number, name in enumerate("abc")}
    outputs = [(oip.Tensor(name, array), binary) for name, array in arrays.items()]
    message, headers = oip.encode_response(outputs, model_name="m", model_version="1")
    length = oip.header_length(headers.get(oip.HEADER))
    for name, array in arrays.items():
        (only,) = oip.decode_response(message, length, only=name).items()
        assert only[0] == name
        assert np.array_equal(only[1], array)
    assert oip.decode_response(message, length, only="d") == {}
    texts = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["glioma"]}
    mixed = json.dumps({"outputs": [texts, {**NUMBERS, "name": "y"}]}).encode()
    assert oip.decode_response(mixed, None, only="y")["y"].shape == (2, 2)
    with pytest.raises(Unsupported, match="BYTES"):
        oip.decode_response(mixed, None)


def test_parameters_that_are_null_are_none() -> None:
    assert not decode({**NUMBERS, "parameters": None}, parameters=None).binary_default
    answer = {"outputs": [{**NUMBERS, "parameters": None}], "parameters": None, "id": None}
    assert oip.decode_response(json.dumps(answer).encode(), None)["x"].shape == (2, 2)


def test_float32_survives_json_unrounded() -> None:
    array = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    message, _ = oip.encode_response([(oip.Tensor("y", array), False)], model_name="m", model_version="1")
    assert np.array_equal(oip.decode_response(message, None)["y"], array)


def test_binary_decoding_is_a_view_of_the_body() -> None:
    message, headers = oip.encode_request([oip.Tensor("x", np.ones((4, 4), np.float32))])
    array = oip.decode_request(message, int(headers[oip.HEADER])).inputs[0].array
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_other_layouts_and_byte_orders_are_encoded_in_row_major_little_endian() -> None:
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    message, headers = oip.encode_request([oip.Tensor("x", array)])
    assert np.array_equal(oip.decode_request(message, int(headers[oip.HEADER])).inputs[0].array, array)


def test_an_answer_tells_model_version_id_and_parameters() -> None:
    outputs = [(oip.Tensor("a", np.ones((1, 2), np.float32)), True), (oip.Tensor("b", np.ones(3, np.int64)), False)]
    message, headers = oip.encode_response(
        outputs, model_name="m", model_version="7", request_id="abc", parameters={"k": 1}
    )
    assert headers["Content-Type"] == "application/octet-stream"
    length = int(headers[oip.HEADER])
    head = json.loads(message[:length])
    assert (head["model_name"], head["model_version"], head["id"], head["parameters"]) == ("m", "7", "abc", {"k": 1})
    assert head["outputs"][0] == {
        "name": "a",
        "shape": [1, 2],
        "datatype": "FP32",
        "parameters": {"binary_data_size": 8},
    }
    assert head["outputs"][1]["data"] == [1, 1, 1]
    assert set(oip.decode_response(message, length)) == {"a", "b"}


def test_fp16_has_no_json_form() -> None:
    with pytest.raises(InvalidInput, match="FP16"):
        oip.encode_response([(oip.Tensor("y", np.ones(2, np.float16)), False)], model_name="m", model_version="1")
    with pytest.raises(InvalidInput, match="FP16"):
        decode({**NUMBERS, "datatype": "FP16"})


def test_data_may_be_flat_or_nested() -> None:
    flat = decode(NUMBERS).inputs[0].array
    nested = decode({**NUMBERS, "data": [[1, 2.5], [-3, 4e2]]}).inputs[0].array
    assert np.array_equal(flat, nested)
    assert flat.tolist() == [[1, 2.5], [-3, 400]]


def test_binary_and_json_inputs_may_be_mixed() -> None:
    message, length = body(NUMBERS, binary(4, name="b", shape=[1]), tail=np.float32(7).tobytes())
    inputs = oip.decode_request(message, length).inputs
    assert inputs[1].array.tolist() == [7]
    assert inputs[0].array.shape == (2, 2)


def test_id_and_output_choices_are_read() -> None:
    request = decode(NUMBERS, id="17")
    assert request.id == "17"
    in_binary = {"binary_data_output": True}
    offered = ["x", "y", "z"]
    assert request.wanted(offered) == {"x": False, "y": False, "z": False}
    assert decode(NUMBERS, parameters=in_binary).wanted(offered) == {"x": True, "y": True, "z": True}
    named = [{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}]
    assert list(decode(NUMBERS, parameters=in_binary, outputs=named).wanted(offered).items()) == [
        ("y", False),
        ("z", True),
    ]
    named = [{"name": "y", "parameters": {"binary_data": True}}]
    assert decode(NUMBERS, outputs=named).wanted(offered) == {"y": True}


def test_an_output_that_does_not_exist_is_refused() -> None:
    for names in (["z"], ["y", "z"]):
        with pytest.raises(InvalidInput, match="the only output is 'y'"):
            decode(NUMBERS, outputs=[{"name": name} for name in names]).wanted(["y"])
    with pytest.raises(InvalidInput, match="the outputs are 'x', 'y'; the request asks for 'y', 'z'"):
        decode(NUMBERS, outputs=[{"name": "y"}, {"name": "z"}]).wanted(["x", "y"])


def test_a_raw_request_is_one_tensor_answered_in_binary() -> None:
    values = np.arange(4, dtype=np.float32)
    request = oip.decode_request(values.tobytes(), 0, raw=oip.RawInput("x", (1, 2, 2)))
    assert request.inputs[0].array.tolist() == [[[0, 1], [2, 3]]]
    assert request.wanted(["y"]) == {"y": True}
    with pytest.raises(InvalidInput, match="17 bytes"):
        oip.decode_request(b"x" * 17, 0, raw=oip.RawInput("x", (1, 2, 2)))
    with pytest.raises(Unsupported):
        oip.decode_request(values.tobytes(), 0)


@pytest.mark.parametrize("value", ["", "-1", "1.5", "abc", "٣", "9" * 20, "1_0", "+3"])
def test_the_header_must_be_a_number(value: str) -> None:
    with pytest.raises(InvalidInput, match=oip.HEADER):
        oip.header_length(value)


def test_an_absent_header_means_all_json() -> None:
    assert oip.header_length(None) is None
    assert oip.header_length("12") == 12


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "malformed"),
        (b"{", "malformed"),
        (b"\xff\xfe\xff", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"[1]", "JSON object"),
        (b'{"inputs": NaN}', "NaN"),
        (b'{"inputs": [-Infinity]}', "Infinity"),
        (b"{}", "at least one"),
        (b'{"inputs": []}', "at least one"),
        (b'{"inputs": {}}', "list of tensors"),
        (b'{"inputs": [3]}', "'name'"),
        (b'{"inputs": [{}]}', "'name'"),
        (b'{"inputs": [{"name": 3}]}', "'name'"),
        (b'{"inputs": [{"name": ""}]}', "'name'"),
    ],
)
def test_messages_that_are_no_requests_are_refused(message: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        oip.decode_request(message, None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"id": 3}, "'id'"),
        ({"parameters": []}, "'parameters'"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output"),
        ({"outputs": "y"}, "'outputs'"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "twice"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}, "binary_data"),
    ],
)
def test_malformed_members_of_the_request_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        decode(NUMBERS, **more)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": None}, "'shape'"),
        ({"shape": [2, "2"]}, "'shape'"),
        ({"shape": [2, -2]}, "'shape'"),
        ({"shape": [2, 2.0]}, "'shape'"),
        ({"shape": [True, 4]}, "'shape'"),
        ({"shape": [2**62, 2**62]}, "too large"),
        ({"shape": [0, 2**70]}, "too large"),
        ({"shape": [1] * 99}, "too large"),
        ({"shape": [2, 3]}, "4 values"),
        ({"datatype": "FP8"}, "unknown datatype"),
        ({"datatype": None}, "unknown datatype"),
        ({"datatype": ["FP32"]}, "unknown datatype"),
        ({"parameters": 3}, "'parameters'"),
        ({"data": None}, "needs 'data'"),
        ({"data": 3}, "needs 'data'"),
        ({"data": []}, "0 values"),
        ({"data": [1, 2, 3, "4"]}, "no FP32"),
        ({"data": [1, 2, 3, True]}, "no FP32"),
        ({"data": [1, 2, 3, None]}, "no FP32"),
        ({"data": [1, 2, 3, [4]]}, "no FP32"),
        ({"data": [[1, 2], [3]]}, "nested"),
        ({"data": [[1, 2], 3]}, "nested"),
        ({"data": [[1, 2, 3, 4]]}, "outer list"),
        ({"data": [[[1], [2]], [[3], [4]]]}, "no FP32"),
        ({"data": [1, 2, 3, 10**400]}, "too large"),
        ({"datatype": "UINT8", "data": [1, 2, 3, 256]}, "range of UINT8"),
        ({"datatype": "UINT8", "data": [1, 2, 3, -1]}, "range of UINT8"),
        ({"datatype": "INT64", "data": [1, 2, 3, 2**63]}, "range of INT64"),
        ({"datatype": "INT32", "data": [1, 2, 3, 4.5]}, "no INT32"),
        ({"datatype": "BOOL", "data": [1, 0, 1, 0]}, "no BOOL"),
    ],
)
def test_malformed_json_tensors_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        decode({**NUMBERS, **changes})


def test_an_input_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        decode(NUMBERS, NUMBERS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [2, 3]}, "takes 24"),
        ({"datatype": "FP64"}, "takes 32"),
        ({"datatype": "BOOL", "shape": [16]}, "BOOL"),
        ({"data": [1, 2, 3, 4]}, "both"),
        ({"parameters": {"binary_data_size": 17}}, "only 16"),
        ({"parameters": {"binary_data_size": 2**80}}, "only 16"),
        ({"parameters": {"binary_data_size": -1}}, "number of bytes"),
        ({"parameters": {"binary_data_size": "16"}}, "number of bytes"),
        ({"parameters": {"binary_data_size": True}}, "number of bytes"),
        ({"parameters": {"binary_data_size": 12}, "shape": [3]}, "left over"),
        ({"shape": [2**60, 2**4]}, "too large"),
    ],
)
def test_malformed_binary_tensors_are_refused(changes: dict[str, Any], words: str) -> None:
    message, length = body(binary(16, **changes), tail=b"\x02" * 16)
    with pytest.raises(InvalidInput, match=words):
        oip.decode_request(message, length)


def test_binary_data_needs_the_header_and_all_its_bytes() -> None:
    message, length = body(binary(16), tail=b"\0" * 16)
    assert oip.decode_request(message, length).inputs[0].array.shape == (2, 2)
    with pytest.raises(InvalidInput, match="malformed"):
        oip.decode_request(message, None)
    with pytest.raises(InvalidInput, match=f"{oip.HEADER} is missing"):
        oip.decode_request(message[:length], None)
    with pytest.raises(InvalidInput, match="only 15 are left"):
        oip.decode_request(message[:-1], length)
    with pytest.raises(InvalidInput, match="1 bytes are left over"):
        oip.decode_request(message + b"\0", length)
    with pytest.raises(InvalidInput, match="malformed"):
        oip.decode_request(message, length - 1)
    with pytest.raises(InvalidInput, match="the body has only"):
        oip.decode_request(message, len(message) + 1)


@pytest.mark.parametrize(
    "request_json",
    [
        {"inputs": [{**NUMBERS, "datatype": "BYTES"}]},
        {"inputs": [{**NUMBERS, "parameters": {"shared_memory_region": "r"}}]},
        {"inputs": [NUMBERS], "outputs": [{"name": "y", "parameters": {"classification": 2}}]},
    ],
)
def test_parts_of_the_protocol_that_are_not_spoken_say_so(request_json: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        oip.decode_request(json.dumps(request_json).encode(), None)


def test_empty_tensors_are_read_in_both_forms() -> None:
    assert decode({**NUMBERS, "shape": [0, 4], "data": []}).inputs[0].array.shape == (0, 4)
    message, length = body(binary(0, shape=[0, 4]))
    assert oip.decode_request(message, length).inputs[0].array.shape == (0, 4)


def test_numbers_beyond_float32_become_infinite_for_the_caller_to_refuse() -> None:
    assert np.isinf(decode({**NUMBERS, "data": [1, 2, 3, 1e300]}).inputs[0].array[1, 1])
