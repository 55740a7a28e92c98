"""A client that we did not write speaks to the gateway, which speaks to a hospital: real sockets, real models."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from torch import nn

from services.hospital.model import VictimConfig, build_victim

CONFIG = VictimConfig(labels=("a", "b", "c"), channels=1, size=(32, 32), width=0.125)
IMAGES = np.random.default_rng(0).random((5, 1, 32, 32), dtype=np.float32)


def victim() -> nn.Module:
    torch.manual_seed(0)
    return build_victim(CONFIG).eval()


def expected(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(victim()(1 - torch.from_numpy(images)).softmax(dim=1))


@pytest.fixture(scope="module")
def url(defend: Callable[..., str]) -> str:
    """Host and port of a gateway in front of a hospital."""
    return defend(victim(), CONFIG, modes="sanitize,smooth,certify", smooth_n=40, certify_n0=10, certify_n=80)


@pytest.fixture
def client(url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(url) as connected:
        yield connected


def tensor(module: Any, array: np.ndarray, datatype: str = "FP32", *, binary: bool = True) -> Any:
    sent = module.InferInput("images", list(array.shape), datatype)
    sent.set_data_from_numpy(array, binary_data=binary)
    return sent


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("defended")
    assert client.is_model_ready("defended", "1")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("defended")
    assert metadata["inputs"][0] == {"name": "images", "datatype": "FP32", "shape": [-1, 1, 32, 32]}
    assert metadata["outputs"][0]["shape"] == [-1, 3]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_scores_in_every_combination_of_forms(
    client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("probabilities", binary_data=binary_out)]
    result = client.infer(
        "defended", [tensor(triton, IMAGES, binary=binary_in)], outputs=outputs, request_id="17", model_version="1"
    )
    scores = result.as_numpy("probabilities")
    assert scores.dtype == np.float32
    assert scores == pytest.approx(expected(IMAGES), rel=1e-4)
    answer = result.get_response()
    assert answer["id"] == "17"
    assert answer["model_name"] == "defended"
    assert answer["parameters"]["artifact_id"] == "sha256-abc"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests(client: triton.InferenceServerClient, algorithm: str) -> None:
    result = client.infer(
        "defended",
        [tensor(triton, IMAGES)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert result.as_numpy("probabilities") == pytest.approx(expected(IMAGES), rel=1e-4)


def test_other_datatypes_of_images(client: triton.InferenceServerClient) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32), dtype=np.uint8)
    same = {"UINT8": levels, "FP64": levels / 255.0, "FP16": (levels / 255).astype(np.float16)}
    for datatype, array in same.items():
        scores = client.infer("defended", [tensor(triton, array, datatype)]).as_numpy("probabilities")
        assert scores == pytest.approx(expected(np.float32(levels / 255)), rel=1e-3)


def test_errors_reach_the_client_with_their_words(client: triton.InferenceServerClient) -> None:
    good = tensor(triton, IMAGES)
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("404", {"model_name": "other", "inputs": [good]}, "unknown model 'other'"),
        ("504", {"model_name": "defended", "inputs": [good], "timeout": 1}, "time that this request has is over"),
        ("400", {"model_name": "defended", "inputs": [tensor(triton, IMAGES[:, :, :8])]}, "expected shape"),
        (
            "400",
            {"model_name": "defended", "inputs": [good], "outputs": [triton.InferRequestedOutput("logits")]},
            "the only output is 'probabilities'",
        ),
        (
            "413",
            {"model_name": "defended", "inputs": [tensor(triton, np.zeros((300, 1, 32, 32), np.float32))]},
            "larger",
        ),
        (
            "501",
            {"model_name": "defended", "inputs": [tensor(triton, np.array([b"x"], dtype=object), "BYTES")]},
            "BYTES",
        ),
        (
            "501",
            {
                "model_name": "defended",
                "inputs": [good],
                "outputs": [triton.InferRequestedOutput("probabilities", class_count=2)],
            },
            "classification",
        ),
    ]
    for status, arguments, words in asked:
        with pytest.raises(triton.InferenceServerException, match=words) as caught:
            client.infer(**arguments)
        assert status in caught.value.status()


def test_several_requests_at_once(url: str) -> None:
    with triton.InferenceServerClient(url, concurrency=4) as client:
        asked = [client.async_infer("defended", [tensor(triton, IMAGES[i : i + 1])]) for i in range(5)]
        scores = np.concatenate([one.get_result().as_numpy("probabilities") for one in asked])
    assert scores == pytest.approx(expected(IMAGES), rel=1e-4)


@pytest.mark.anyio
async def test_the_asynchronous_client(url: str) -> None:
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("defended")
        assert (await client.get_model_metadata("defended"))["name"] == "defended"
        for binary in (True, False):
            result = await client.infer(
                "defended",
                [tensor(triton_aio, IMAGES, binary=binary)],
                outputs=[triton_aio.InferRequestedOutput("probabilities", binary_data=binary)],
            )
            assert result.as_numpy("probabilities") == pytest.approx(expected(IMAGES), rel=1e-4)
        with pytest.raises(triton.InferenceServerException, match="unknown model"):
            await client.infer("other", [tensor(triton_aio, IMAGES)])


@pytest.mark.anyio
async def test_the_asynchronous_client_asks_everything_that_the_other_one_does(url: str) -> None:
    async with triton_aio.InferenceServerClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("defended", "1")
        assert not await client.is_model_ready("other")
        assert "binary_tensor_data" in (await client.get_server_metadata())["extensions"]
        assert (await client.get_model_metadata("defended", "1"))["outputs"][0]["shape"] == [-1, 3]
        for algorithm in ("gzip", "deflate"):
            result = await client.infer(
                "defended",
                [tensor(triton_aio, IMAGES)],
                model_version="1",
                request_id="17",
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )
            assert result.as_numpy("probabilities") == pytest.approx(expected(IMAGES), rel=1e-4)
            assert result.get_response()["id"] == "17"
            assert result.get_response()["parameters"]["artifact_id"] == "sha256-abc"
        asked = (client.infer("defended", [tensor(triton_aio, IMAGES[i : i + 1])]) for i in range(5))
        scores = [answer.as_numpy("probabilities") for answer in await asyncio.gather(*asked)]
        assert np.concatenate(scores) == pytest.approx(expected(IMAGES), rel=1e-4)
        wrong: list[tuple[str, Any, str]] = [
            ("400", tensor(triton_aio, IMAGES[:, :, :8]), "expected shape"),
            ("501", tensor(triton_aio, np.array([b"x"], dtype=object), "BYTES"), "BYTES"),
        ]
        for status, sent, words in wrong:
            with pytest.raises(triton.InferenceServerException, match=words) as caught:
                await client.infer("defended", [sent])
            assert status in caught.value.status()


@pytest.mark.parametrize("binary", [True, False])
def test_votes_and_certificates_arrive_as_tensors(client: triton.InferenceServerClient, binary: bool) -> None:
    result = client.infer("defended", [tensor(triton, IMAGES)], query_params={"mode": "smooth", "n": 20})
    assert result.as_numpy("label").dtype == np.int64
    assert result.as_numpy("probabilities").sum(axis=1) == pytest.approx(np.ones(5))
    assert result.as_numpy("radius") is None
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("radius", "label", "radius_linf")]
    result = client.infer("defended", [tensor(triton, IMAGES)], outputs=wanted, query_params={"mode": "certify"})
    label, radius = result.as_numpy("label"), result.as_numpy("radius")
    assert (label.dtype, label.shape) == (np.int64, (5,))
    assert (radius.dtype, radius.shape) == (np.float32, (5,))
    assert np.array_equal(label == -1, radius == 0)
    assert result.as_numpy("radius_linf") == pytest.approx(radius / 32, rel=1e-6)
    assert result.as_numpy("probabilities") is None
    parameters = result.get_response()["parameters"]
    assert parameters["evidence_mode"] == "certify"
    assert parameters["evidence_queries"] == 5 * 90


def test_a_dry_run_tells_tritonclient_the_cost(client: triton.InferenceServerClient) -> None:
    query = {"mode": "certify", "dry_run": "true"}
    answer = client.infer("defended", [tensor(triton, IMAGES)], query_params=query).get_response()
    assert answer["outputs"] == []
    assert answer["parameters"]["evidence_queries"] == 5 * 90


@pytest.mark.anyio
async def test_the_asynchronous_client_receives_certificates_too(url: str) -> None:
    async with triton_aio.InferenceServerClient(url) as client:
        result = await client.infer("defended", [tensor(triton_aio, IMAGES)], query_params={"mode": "certify"})
        assert result.as_numpy("label").shape == (5,)
        with pytest.raises(triton.InferenceServerException, match="n must lie between"):
            await client.infer("defended", [tensor(triton_aio, IMAGES)], query_params={"mode": "certify", "n": 81})
