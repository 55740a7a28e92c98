import asyncio
import base64
import json
import random
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gateway_fakes import (
    RNG,
    SIGNATURE,
    WHITE,
    Answers,
    Upstream,
    gateway,
    images,
    named,
    pixels,
    scored,
    segmenting,
    victim,
)
from service_fakes import assert_error, scores_of, tensor_request
from torch import Tensor

from services.gateway import readiness
from services.gateway.config import GatewaySettings
from services.protocol import oip
from services.protocol.errors import InvalidInput
from services.protocol.images import decode_image, encode_png
from services.protocol.masks import class_map, decode_mask

pytestmark = pytest.mark.anyio


async def test_an_image_is_sanitized_forwarded_and_answered_with_the_artifact() -> None:
    upstream = Upstream()
    png = encode_png(images(1)[0])
    clean = 1 - decode_image(png, channels=1, size=(8, 6))
    async with gateway(upstream) as http:
        for question in (
            {"files": {"file": png}},
            {"content": png, "headers": {"Content-Type": "image/png"}},
        ):
            response = await http.post("/predict", **question)
            assert response.status_code == 200, response.text
            told = response.json()
            scores = victim(clean[None])[0]
            assert told["probabilities"] == pytest.approx(scores.tolist())
            assert told["label"] == ["bright", "dark"][int(scores.argmax())]
            assert told["labels"] == ["bright", "dark"]
            assert told["artifact"] == SIGNATURE
            assert told["evidence"] == {"mode": "sanitize", "queries": 1}
            assert response.headers["X-Artifact-Id"] == "sha256-abc"
    assert len(upstream.received) == 2
    for received in upstream.received:
        assert np.array_equal(received, clean)


@pytest.mark.parametrize("path", ["/predict", "/v2/models/defended/infer", "/v2/models/defended/versions/1/infer"])
async def test_tensors_are_sanitized_forwarded_and_answered_in_their_own_form(path: str) -> None:
    upstream = Upstream()
    batch = images(20) * 3 - 1  # noise beyond [0,1] is the sanitizer's own business
    clean = (1 - batch).clip(0, 1)
    async with gateway(upstream, max_batch=8, forward_batch=16) as http:
        response = await http.post(path, **tensor_request(batch))
        assert response.headers["X-Artifact-Id"] == "sha256-abc"
        assert np.array_equal(scores_of(response), victim(clean))
        head = json.loads(response.content[: int(response.headers[oip.HEADER])])
        assert head["parameters"] == {
            "artifact_id": "sha256-abc",
            "artifact_name": "ours",
            "artifact_version": "1",
            "sigma": 0.25,
            "queries_spent": 1234,
            "evidence_mode": "sanitize",
            "evidence_queries": 20,
        }
        assert upstream.requests == 3
        assert sorted(image.tobytes() for image in upstream.received) == sorted(image.tobytes() for image in clean)
        data = [{"name": "x", "shape": [20, 1, 8, 6], "datatype": "FP32", "data": batch.tolist()}]
        response = await http.post(path, json={"inputs": data})
        assert response.headers["Content-Type"] == "application/json"
        assert np.array_equal(scores_of(response), victim(clean))


async def test_an_image_is_answered_with_the_victims_mask_of_its_sanitized_form() -> None:
    upstream = Upstream(segmenting)
    png = encode_png(RNG.random((1, 10, 40)))
    clean = 1 - decode_image(png, channels=1, size=(8, 6))
    classes = class_map(pixels(clean[None])[0], (10, 40))
    assert 0 < classes.mean() < 1
    async with gateway(upstream, labels=("background", "polyp")) as http:
        for question in ({"files": {"file": png}}, {"content": png, "headers": {"Content-Type": "image/png"}}):
            response = await http.post("/predict", **question)
            assert response.status_code == 200, response.text
            told = response.json()
            assert set(told) == {"labels", "lesion_fraction", "mask", "evidence", "artifact"}
            assert told["labels"] == ["background", "polyp"]
            assert told["artifact"] == SIGNATURE
            assert told["lesion_fraction"] == pytest.approx(classes.mean())
            assert np.array_equal(decode_mask(base64.b64decode(told["mask"]), 2, (10, 40)), classes)
            question["headers"] = {**question.get("headers", {}), "Accept": "image/png"}
            other = await http.post("/predict", **question)
            assert other.headers["Content-Type"] == "image/png"
            assert other.content == base64.b64decode(told["mask"])
            for one in (response, other):
                assert one.headers["X-Artifact-Id"] == "sha256-abc"
                assert json.loads(one.headers["X-Evidence"]) == {"mode": "sanitize", "queries": 1}
    assert len(upstream.received) == 4
    for received in upstream.received:
        assert np.array_equal(received, clean)


async def test_scores_of_every_pixel_pass_through_in_the_tensors_own_form() -> None:
    batch = images(20)
    async with gateway(Upstream(segmenting), max_batch=8, forward_batch=16) as http:
        assert np.array_equal(
            scores_of(await http.post("/predict", **tensor_request(batch))), pixels((1 - batch).clip(0, 1))
        )
        data = [{"name": "x", "shape": [20, 1, 8, 6], "datatype": "FP32", "data": batch.tolist()}]
        response = await http.post("/v2/models/defended/infer", json={"inputs": data})
        assert response.json()["outputs"][0]["shape"] == [20, 2, 8, 6]
        assert np.array_equal(scores_of(response), pixels((1 - batch).clip(0, 1)))


async def test_a_segmenter_is_asked_for_its_classes_names_once_too() -> None:
    upstream = Upstream(segmenting)
    upstream.describes = lambda: httpx.Response(200, json={"labels": ["tissue", "polyp"], "mask": "aaaa"})
    async with gateway(upstream, labels=()) as http:
        for _ in range(2):
            told = (await http.post("/predict", files={"file": WHITE})).json()
            assert told["labels"] == ["tissue", "polyp"]
    assert upstream.described == 1


SICK: dict[str, Callable[[Tensor], Tensor]] = {
    "raises": lambda images: images @ images.new_zeros(99, 99),
    "nan": lambda images: images * float("nan"),
    "above the range": lambda images: images * 0 + 1.01,
    "below the range": lambda images: images * 0 - 0.01,
    "another shape": lambda images: images[:, :, :4],
    "too few": lambda images: images[1:],
    "no tensor": lambda _images: torch.zeros(()),
}


@pytest.mark.parametrize("how", SICK)
async def test_when_the_sanitizer_fails_nothing_is_forwarded(how: str) -> None:
    upstream = Upstream()
    async with gateway(upstream, Answers(SICK[how])) as http:
        for question in (tensor_request(images(3)), {"files": {"file": encode_png(images(1)[0])}}):
            response = await http.post("/predict", **question)
            assert_error(response, 500)
            assert response.json() == {"error": "internal error"}
            assert "X-Artifact-Id" not in response.headers
    assert upstream.requests == 0


async def test_nothing_that_is_refused_is_forwarded() -> None:
    upstream = Upstream()
    bad = images(2)
    bad[1, 0, 0, 0] = np.nan
    async with gateway(upstream, max_body_mb=1) as http:
        assert_error(await http.post("/predict", **tensor_request(bad)), 400, "not finite")
        assert_error(await http.post("/predict", **tensor_request(bad[:, :, :4])), 400, "[N, 1, 8, 6]")
        assert_error(await http.post("/predict", content=b"{"), 400)
        assert_error(await http.post("/predict", files={"file": b"GIF89a"}), 415)
        assert_error(await http.post("/predict", content=b"x" * 2**21), 413)
        assert_error(await http.post("/v2/models/other/infer", **tensor_request(images(1))), 404, "'other'")
        assert_error(await http.post("/v2/models/defended/versions/2/infer", **tensor_request(images(1))), 404, "'2'")
        png = {"content": encode_png(images(1)[0]), "headers": {"Content-Type": "image/png"}}
        assert_error(await http.post("/v2/models/defended/infer", **png), 415)
    assert upstream.requests == 0


@pytest.mark.parametrize("seed", range(4))
async def test_damaged_requests_are_told_apart_from_mistakes_and_leave_only_sanitized_images(seed: int) -> None:
    """Only what this sanitizer returns is uniformly grey."""
    upstream = Upstream()
    upstream.describes = named("day", "night")
    requests = [
        tensor_request(images(2)),
        {"content": encode_png(images(1)[0]), "headers": {"Content-Type": "image/png"}},
    ]
    generator = random.Random(seed)
    async with gateway(upstream, Answers(lambda batch: torch.full_like(batch, 0.5)), labels=()) as http:
        for count in range(100):
            request = requests[count % 2]
            damaged = bytearray(request["content"])
            for _ in range(generator.randrange(4)):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            response = await http.post("/predict", content=bytes(damaged), headers=request["headers"])
            if response.status_code != 200:
                assert_error(response, response.status_code)
                assert response.status_code in (400, 413, 415, 501)
                assert "Traceback" not in response.text
    assert upstream.received
    assert all(np.allclose(image, 0.5, atol=1 / 255) for image in upstream.received)


def throws(error: Exception) -> httpx.Response:
    raise error


BUSY = {"Retry-After": "17"}
OUTAGES: dict[str, tuple[Callable[[httpx.Request], httpx.Response], int]] = {
    "429": (lambda _: httpx.Response(429, headers=BUSY, json={"error": "secret"}), 429),
    "503": (lambda _: httpx.Response(503, headers=BUSY, json={"error": "secret"}), 503),
    "502": (lambda _: httpx.Response(502), 502),
    "504": (lambda _: httpx.Response(504), 504),
    "refused": (lambda _: throws(httpx.ConnectError("secret")), 502),
    "broken": (lambda _: throws(httpx.ReadError("secret")), 502),
    "slow": (lambda _: throws(httpx.ReadTimeout("secret")), 504),
    "400": (lambda _: httpx.Response(400, json={"error": "secret"}), 502),
    "404": (lambda _: httpx.Response(404, json={"error": "secret"}), 502),
    "413": (lambda _: httpx.Response(413, json={"error": "secret"}), 502),
    "500": (lambda _: httpx.Response(500, json={"error": "secret"}), 502),
    "garbage": (lambda _: httpx.Response(200, content=b"secret"), 502),
    "nan": (lambda _: scored(np.full((2, 2), np.nan, np.float32)), 502),
    "too few rows": (lambda _: scored(np.ones((1, 2), np.float32)), 502),
    "pixels of another image": (lambda _: scored(np.ones((2, 2, 6, 8), np.float32)), 502),
    "pixels with too many labels": (lambda _: scored(np.ones((2, 3, 8, 6), np.float32)), 502),
    "too many labels": (lambda _: scored(np.ones((2, 3), np.float32)), 502),
    "too few labels": (lambda _: scored(np.ones((2, 1), np.float32)), 502),
}


@pytest.mark.parametrize("how", OUTAGES)
async def test_upstream_failures_keep_their_meaning_and_tell_nothing_of_the_inside(how: str) -> None:
    fails, status = OUTAGES[how]
    upstream = Upstream(fails)
    async with gateway(upstream) as http:
        response = await http.post("/predict", **tensor_request(images(2)))
    assert_error(response, status)
    assert "secret" not in response.text
    assert "http://" not in response.text
    assert response.headers.get("Retry-After") == (BUSY["Retry-After"] if status in (429, 503) else None)
    assert upstream.requests == 1


async def test_without_labels_in_the_artifact_the_victim_is_asked_once_with_a_sanitized_image() -> None:
    upstream = Upstream()
    upstream.describes = named("day", "night")
    async with gateway(upstream, labels=()) as http:
        for _ in range(2):
            told = (await http.post("/predict", files={"file": WHITE})).json()
            assert (told["label"], told["labels"]) == ("night", ["day", "night"])
    assert len(upstream.received) == 3  # two answers and one question for the names
    assert all((image == 0).all() for image in upstream.received)


async def test_concurrent_first_requests_ask_for_the_labels_once() -> None:
    all_scored = asyncio.Event()

    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.headers["Content-Type"] == "image/png":
                await all_scored.wait()
            response = await super().handle_async_request(request)
            if len(self.received) - self.described == 5:  # images: those of several clients may travel together
                all_scored.set()
            return response

    upstream = Slow()
    upstream.describes = named("day", "night")
    async with gateway(upstream, labels=()) as http:
        responses = await asyncio.gather(*(http.post("/predict", files={"file": WHITE}) for _ in range(5)))
    assert [response.json()["label"] for response in responses] == ["night"] * 5
    assert upstream.described == 1


NAMELESS: dict[str, Callable[[], httpx.Response]] = {
    **{str(status): partial(httpx.Response, status) for status in (400, 403, 404, 405, 413, 415, 500, 501)},
    "no json": lambda: httpx.Response(200, content=b"plain words"),
    "no labels": lambda: httpx.Response(200, json={"label": "day"}),
    "labels in no list": lambda: httpx.Response(200, json={"label": "", "labels": "ab", "probabilities": []}),
    "too few labels": named("day"),
    "too many labels": named("day", "night", "dawn"),
}


@pytest.mark.parametrize("how", NAMELESS)
async def test_a_victim_without_fitting_labels_is_asked_once_and_classes_are_named_by_number(how: str) -> None:
    upstream = Upstream()
    upstream.describes = NAMELESS[how]
    async with gateway(upstream, labels=()) as http:
        for _ in range(3):
            told = (await http.post("/predict", files={"file": WHITE})).json()
            assert (told["label"], told["labels"], told["probabilities"]) == ("1", ["0", "1"], [0, 1])
    assert upstream.described == 1


@pytest.mark.parametrize("how", ["429", "503", "502", "504", "refused", "broken", "slow"])
async def test_a_passing_failure_to_learn_the_labels_keeps_its_meaning_and_is_not_remembered(how: str) -> None:
    fails, status = OUTAGES[how]
    upstream = Upstream()
    upstream.describes = lambda: fails(httpx.Request("POST", "http://victim"))
    async with gateway(upstream, labels=()) as http:
        response = await http.post("/predict", files={"file": WHITE})
        assert_error(response, status)
        assert "secret" not in response.text
        assert response.headers.get("Retry-After") == (BUSY["Retry-After"] if status in (429, 503) else None)
        upstream.describes = named("day", "night")
        assert (await http.post("/predict", files={"file": WHITE})).json()["label"] == "night"


async def test_tensor_calls_need_no_labels_and_ask_for_none() -> None:
    upstream = Upstream()
    async with gateway(upstream, labels=()) as http:
        assert scores_of(await http.post("/predict", **tensor_request(images(3)))).shape == (3, 2)
    assert upstream.described == 0
    assert upstream.requests == 1


@pytest.mark.parametrize("question", [tensor_request(images(1)), {"files": {"file": WHITE}}])
@pytest.mark.parametrize("fails", [None, segmenting])
async def test_scores_that_do_not_fit_the_artifacts_labels_are_refused_in_every_form(
    question: dict[str, Any], fails: Any
) -> None:
    async with gateway(Upstream(fails), labels=("a", "b", "c")) as http:
        assert_error(await http.post("/predict", **question), 502, "2 scores", "3 labels")


async def test_another_replica_answers_when_one_cannot_be_reached() -> None:
    def one_is_away(request: httpx.Request) -> httpx.Response:
        if request.url.host == "down":
            raise httpx.ConnectError("refused")
        return scored(np.ones((2, 2), np.float32))

    async with gateway(Upstream(one_is_away), victim_url="http://down,http://up") as http:
        assert scores_of(await http.post("/predict", **tensor_request(images(2)))).shape == (2, 2)


async def test_metadata_says_what_the_model_takes_and_answers() -> None:
    async with gateway(Upstream()) as http:
        server = (await http.get("/v2")).json()
        assert server["extensions"] == ["binary_tensor_data"]
        for path in ("/v2/models/defended", "/v2/models/defended/versions/1"):
            told = (await http.get(path)).json()
            assert told["name"] == "defended"
            assert told["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 8, 6]}]
            assert told["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}]
        for path in ("models/other", "models/defended/versions/7", "models/other/ready", "nothing"):
            assert_error(await http.get(f"/v2/{path}"), 404)
        assert_error(await http.get("/docs"), 404)


async def outputs_shape(http: httpx.AsyncClient) -> list[int]:
    told = (await http.get("/v2/models/defended")).json()
    shape: list[int] = told["outputs"][0]["shape"]
    return shape


@pytest.mark.parametrize("labels", [("bright", "dark"), ()])
@pytest.mark.parametrize(("fails", "shape"), [(None, [-1, 2]), (segmenting, [-1, 2, 8, 6])])
async def test_metadata_tells_the_shape_that_the_victim_has_answered_in(
    labels: tuple[str, ...], fails: Any, shape: list[int]
) -> None:
    upstream = Upstream(fails)
    async with gateway(upstream, labels=labels) as http:
        await http.post("/predict", **tensor_request(images(3)))
        assert await outputs_shape(http) == shape
    assert upstream.requests == 1


async def test_for_metadata_a_victim_that_was_never_asked_is_asked_once_about_one_sanitized_image() -> None:
    upstream = Upstream(segmenting)
    async with gateway(upstream, Answers(lambda batch: batch / 2), labels=()) as http:
        shapes = await asyncio.gather(*(outputs_shape(http) for _ in range(5)))
    assert shapes == [[-1, 2, 8, 6]] * 5
    assert [image.tolist() for image in upstream.received] == [np.full((1, 8, 6), 0.25).tolist()]


@pytest.mark.parametrize("how", ["429", "503", "refused", "slow", "400", "garbage"])
async def test_metadata_that_cannot_be_learned_is_not_invented(how: str) -> None:
    fails, status = OUTAGES[how]
    upstream = Upstream(fails)
    async with gateway(upstream) as http:
        response = await http.get("/v2/models/defended")
        assert_error(response, status)
        assert "secret" not in response.text
        upstream.fails = segmenting
        assert await outputs_shape(http) == [-1, 2, 8, 6]


async def test_metadata_of_scores_that_do_not_fit_the_artifact_are_refused() -> None:
    async with gateway(Upstream(), labels=("a", "b", "c")) as http:
        assert_error(await http.get("/v2/models/defended"), 502, "2 scores", "3 labels")


async def test_the_model_name_is_a_setting() -> None:
    async with gateway(Upstream(), model_name="tumors") as http:
        assert (await http.get("/v2/models/tumors/ready")).status_code == 200
        assert_error(await http.get("/v2/models/defended/ready"), 404, "'tumors'")


@pytest.mark.parametrize("what", ["health", "models/defended", "models/defended/versions/1"])
async def test_ready_only_while_the_victim_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    path = f"/v2/{what}/ready"
    upstream = Upstream()
    async with gateway(upstream) as http:
        assert (await http.get(path)).status_code == 200
        upstream.ready = 503
        assert_error(await http.get(path), 503)
        assert (await http.get("/v2/health/live")).status_code == 200


async def test_too_much_work_is_answered_429_also_while_the_victim_is_slow() -> None:
    gate = asyncio.Event()

    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await gate.wait()
            return await super().handle_async_request(request)

    async with gateway(Slow(), max_queue=8) as http:
        waiting = [asyncio.create_task(http.post("/predict", **tensor_request(images(6)))) for _ in range(3)]
        for refused in islice(asyncio.as_completed(waiting), 2):  # whichever comes first is let in
            assert_error(await refused, 429, "6 images")
        gate.set()
        assert sorted([(await task).status_code for task in waiting]) == [200, 429, 429]


async def test_concurrent_clients_get_their_own_answers() -> None:
    async with gateway(Upstream(), max_batch=8, max_delay_ms=5, forward_batch=3) as http:

        async def one(count: int) -> bool:
            batch = images(count)
            response = await http.post("/predict", **tensor_request(batch))
            return np.array_equal(scores_of(response), victim(1 - batch))

        assert all(await asyncio.gather(*(one(count) for count in range(1, 20))))


@pytest.mark.parametrize(
    ("value", "urls"),
    [("http://a", ("http://a",)), ("http://a, http://b,", ("http://a", "http://b")), (["http://a"], ("http://a",))],
)
def test_victim_urls_are_given_one_by_one_or_separated_by_commas(value: object, urls: tuple[str, ...]) -> None:
    assert GatewaySettings(**{"artifact": "x", "victim_url": value}).victim_url == urls


async def test_a_victim_that_others_made_is_asked_as_the_mapping_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VICTIM_KEY", "s3cret")
    mapping = tmp_path / "victim.toml"
    mapping.write_text(
        """
        labels = ["bright", "dark"]
        headers = { X-Key = "${VICTIM_KEY}" }
        image = { body = "image/png" }
        answer = { scores = "result" }
        """
    )
    asked: list[np.ndarray] = []

    class Foreign(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert request.headers["X-Key"] == "s3cret"
            if request.method == "GET":
                return httpx.Response(404)
            asked.append(decode_image(await request.aread(), channels=1, size=(8, 6)))
            if len(asked) > 2:
                return httpx.Response(200, json={"error": request.headers["X-Key"]})
            bright, dark = victim(asked[-1][None])[0].tolist()
            return httpx.Response(200, json={"result": {"dark": dark, "bright": bright}})

    urls = {"victim_url": "http://elsewhere/classify", "victim_mapping": mapping}
    async with gateway(Foreign(), labels=(), **urls) as http:
        assert (await http.get("/v2/health/ready")).status_code == 200
        told = (await http.post("/predict", files={"file": WHITE})).json()
        assert (told["labels"], told["label"], told["probabilities"]) == (["bright", "dark"], "dark", [0, 1])
        assert len(asked) == 2  # its scores, and its names
        assert all((image == 0).all() for image in asked)
        response = await http.post("/predict", **tensor_request(images(1)))
        assert_error(response, 502)
    assert "s3cret" not in response.text + caplog.text


async def test_the_wire_is_a_setting() -> None:
    class Uploads(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert request.headers["Content-Type"].startswith("multipart/form-data")
            return httpx.Response(200, json={"labels": ["bright", "dark"], "probabilities": [0.25, 0.75]})

    async with gateway(Uploads(), wire="image") as http:
        assert scores_of(await http.post("/predict", **tensor_request(images(3)))).tolist() == [[0.25, 0.75]] * 3


async def test_a_mapping_that_is_none_is_told_when_the_gateway_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        async with gateway(Upstream(), victim_mapping=tmp_path / "missing.toml"):
            pass
