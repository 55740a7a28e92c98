"""The modes over HTTP: what is computed, what is said of it, and what it costs."""

import asyncio
import base64
import io
import json
import math
from collections.abc import Callable
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gateway_fakes import SIGNATURE, Answers, Upstream, gateway, images, named, scored, segmenting
from PIL import Image
from service_fakes import assert_error, scores_of, serving, tensor_request

from defense.segmentation_smoothing import certify_mask_counts
from defense.smoothing import ABSTAIN, lower_bound
from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Version
from services.protocol import oip, pool, replicas
from services.protocol.images import encode_png

pytestmark = pytest.mark.anyio

PHI = NormalDist()
ALL = {"modes": "sanitize,smooth,certify", "smooth_n": 50, "certify_n0": 20, "certify_n": 200}
SIGMOID = Answers(torch.sigmoid)
"""A sanitizer that maps any value into [0,1] and loses nothing: what the victim sees tells the noise."""


def sent(request: httpx.Request) -> np.ndarray:
    array: np.ndarray = (
        oip.decode_request(request.content, oip.header_length(request.headers[oip.HEADER])).inputs[0].array
    )
    return np.log(array / (1 - array))


def brighter_than(threshold: float) -> Callable[[httpx.Request], httpx.Response]:
    """A linear victim: class 1 where the mean is above the threshold.

    An image of one grey g lies at the distance (g - threshold) sqrt(48) from the boundary, and under noise of sigma its
    class 1 has the probability Phi(distance / sigma).
    """

    def answers(request: httpx.Request) -> httpx.Response:
        bright = sent(request).mean(axis=(1, 2, 3)) > threshold
        return scored(np.stack([~bright, bright], axis=1).astype(np.float32))

    return answers


def brighter_pixels(request: httpx.Request) -> httpx.Response:
    """A segmenter: class 1 where a pixel is above one half."""
    bright = sent(request) > 0.5
    return scored(np.concatenate([~bright, bright], axis=1).astype(np.float32))


def grey(level: float, size: tuple[int, int] = (8, 6)) -> bytes:
    return encode_png(np.full((1, *size), level, np.float32))


def outputs_of(response: httpx.Response) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The parameters and the outputs of a tensor answer."""
    assert response.status_code == 200, response.text
    length = response.headers.get(oip.HEADER)
    head = json.loads(response.content[: None if length is None else int(length)])
    return head["parameters"], oip.decode_response(response.content, oip.header_length(length))


async def test_smooth_answers_the_majority_of_the_victims_answers() -> None:
    upstream = Upstream(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL) as http:
        response = await http.post("/predict?mode=smooth", files={"file": grey(0.9)})
        told = response.json()
    assert (told["label"], told["labels"], told["probabilities"]) == ("dark", ["bright", "dark"], [0, 1])
    assert told["artifact"] == SIGNATURE
    assert told["evidence"] == {
        "mode": "smooth",
        "sigma": 0.25,
        "alpha": 0.001,
        "n": 50,
        "abstained": False,
        "votes": [0, 50],
        "queries": 50,
    }
    assert response.headers["X-Artifact-Id"] == "sha256-abc"
    assert json.loads(response.headers["X-Evidence"]) == {
        name: value for name, value in told["evidence"].items() if name != "votes"
    }
    assert upstream.requests == 1, "all copies travel as one batch"
    assert len(upstream.received) == 50


async def test_an_undecided_vote_is_no_answer() -> None:
    async with gateway(Upstream(brighter_than(128 / 255)), SIGMOID, **ALL, alpha=1e-6) as http:
        for mode in ("smooth", "certify"):
            told = (await http.post(f"/predict?mode={mode}", files={"file": grey(128 / 255)})).json()
            assert told["label"] is None
            assert told["evidence"]["abstained"] is True
            shares = [votes / told["evidence"]["n"] for votes in told["evidence"]["votes"]]
            assert told["probabilities"] == pytest.approx(shares)
    assert (told["evidence"]["radius"], told["evidence"]["radius_linf"]) == (0, 0)


async def test_a_unanimous_certificate_has_the_radius_of_the_closed_form() -> None:
    async with gateway(Upstream(brighter_than(0.5)), SIGMOID, **ALL) as http:
        told = (await http.post("/predict?mode=certify", files={"file": grey(1.0)})).json()
    radius = 0.25 * PHI.inv_cdf(0.001 ** (1 / 200))
    assert told["label"] == "dark"
    assert told["evidence"] == {
        "mode": "certify",
        "sigma": 0.25,
        "alpha": 0.001,
        "n0": 20,
        "n": 200,
        "abstained": False,
        "radius": pytest.approx(radius, rel=1e-12),
        "radius_linf": pytest.approx(radius / math.sqrt(48), rel=1e-12),
        "votes_n0": [0, 20],
        "votes": [0, 200],
        "queries": 220,
    }


async def test_the_certificate_follows_from_the_probability_of_the_class_under_noise() -> None:
    level = 153 / 255  # an image of 8 bits has no other
    distance = (level - 0.575) * math.sqrt(48)
    probability = PHI.cdf(distance / 0.25)
    assert 0.7 < probability < 0.8
    async with gateway(
        Upstream(brighter_than(0.575)), SIGMOID, **{**ALL, "certify_n": 2000, "alpha": 1e-6}, chunk=300
    ) as http:
        told = (await http.post("/predict?mode=certify", files={"file": grey(level)})).json()
    against, hits = told["evidence"]["votes"]
    assert against + hits == 2000
    assert hits / 2000 == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / 2000))
    radius = told["evidence"]["radius"]
    assert radius == pytest.approx(0.25 * PHI.inv_cdf(lower_bound(hits, 2000, 1e-6)), rel=1e-12)
    assert 0 < radius < distance


async def test_the_noise_is_fresh_for_every_request_and_as_wide_as_said() -> None:
    upstream = Upstream(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL, sigma=0.5) as http:
        for _ in range(2):
            told = (await http.post("/predict?mode=certify", files={"file": grey(0.4)})).json()
            assert told["evidence"]["sigma"] == 0.5
            assert told["artifact"]["sigma"] == 0.25
    seen = np.stack(upstream.received).astype(np.float64)
    noise = np.log(seen / (1 - seen)) - 0.4
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    assert len(np.unique(noise[:, 0, 0, 0])) > 430  # float32 may coincide
    assert (noise + 0.4).min() < -1, "nothing is clipped to the range of images"


async def test_a_batch_of_tensors_is_answered_row_by_row() -> None:
    batch = np.stack([np.full((1, 8, 6), level, np.float32) for level in (0.0, 1.0, 0.5, 1.0)])
    batch[3] = -3.0  # tensors need not be images
    radius = 0.25 * PHI.inv_cdf(0.001 ** (1 / 200))
    async with gateway(Upstream(brighter_than(0.5)), SIGMOID, **ALL, chunk=64) as http:
        for binary in (True, False):
            for path in ("/predict", "/v2/models/defended/infer"):
                response = await http.post(f"{path}?mode=certify", **tensor_request(batch, binary_output=binary))
                parameters, outputs = outputs_of(response)
                assert (oip.HEADER in response.headers) is binary
                assert list(outputs) == ["probabilities", "label", "radius", "radius_linf"]
                assert outputs["probabilities"].dtype == np.float32
                assert outputs["probabilities"][[0, 1, 3]].tolist() == [[1, 0], [0, 1], [1, 0]]
                assert outputs["label"].dtype == np.int64
                assert outputs["label"][[0, 1, 3]].tolist() == [0, 1, 0]
                assert outputs["radius"].dtype == outputs["radius_linf"].dtype == np.float32
                assert outputs["radius"][[0, 1, 3]] == pytest.approx(radius, rel=1e-6)
                assert (outputs["radius"] <= radius).all(), "rounding claims nothing"
                assert outputs["radius_linf"] == pytest.approx(outputs["radius"] / math.sqrt(48), rel=1e-6)
                assert (outputs["label"][2] == ABSTAIN) == (outputs["radius"][2] == 0)
                assert parameters == {
                    "artifact_id": "sha256-abc",
                    "artifact_name": "ours",
                    "artifact_version": "1",
                    "sigma": 0.25,
                    "queries_spent": 1234,
                    "evidence_mode": "certify",
                    "evidence_sigma": 0.25,
                    "evidence_alpha": 0.001,
                    "evidence_n0": 20,
                    "evidence_n": 200,
                    "evidence_queries": 880,
                }
        _, outputs = outputs_of(await http.post("/predict?mode=smooth", **tensor_request(batch)))
        assert list(outputs) == ["probabilities", "label"]
        assert outputs["label"][[0, 1, 3]].tolist() == [0, 1, 0]


async def test_outputs_are_chosen_by_name_among_those_of_the_mode() -> None:
    message: dict[str, Any] = {
        "inputs": [{"name": "x", "shape": [1, 1, 8, 6], "datatype": "FP32", "data": [1.0] * 48}],
        "outputs": [{"name": "radius"}, {"name": "label"}],
    }
    upstream = Upstream(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL) as http:
        _, outputs = outputs_of(await http.post("/predict?mode=certify", json=message))
        assert set(outputs) == {"radius", "label"}
        requests = upstream.requests
        for mode, words in (("smooth", "the outputs are 'probabilities', 'label'"), ("sanitize", "the only output is")):
            assert_error(await http.post(f"/predict?mode={mode}", json=message), 400, words)
        assert upstream.requests == requests


def plane(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        return np.asarray(image)


@pytest.mark.parametrize("mode", ["smooth", "certify"])
async def test_a_mask_abstains_at_the_pixels_that_do_and_nowhere_else(mode: str) -> None:
    # Columns of 20 pixels each. Of a column's value at the model's size, each neighbour has one eighth: the two in the
    # middle are one half there, which is undecided.
    upload = np.tile(np.repeat([0, 0, 0.6, 0.4, 1, 1], 20), (1, 80, 1))
    columns = np.arange(120) // 20
    middle = np.tile((columns == 2) | (columns == 3), (80, 1))
    async with gateway(
        Upstream(brighter_pixels), SIGMOID, labels=("background", "polyp"), **ALL, alpha=1e-4, sigma=0.1
    ) as http:
        question = {"content": encode_png(upload), "headers": {"Content-Type": "image/png"}}
        response = await http.post(f"/predict?mode={mode}", **question)
        told = response.json()
        question["headers"]["Accept"] = "image/png"
        other = await http.post(f"/predict?mode={mode}", **question)
    assert set(told) == {"labels", "lesion_fraction", "mask", "abstention", "evidence", "artifact"}
    assert told["labels"] == ["background", "polyp"]
    abstention = plane(base64.b64decode(told["abstention"]))
    assert abstention.shape == middle.shape
    assert np.array_equal(abstention == 255, middle)
    assert set(np.unique(abstention)) == {0, 255}
    mask = plane(base64.b64decode(told["mask"]))
    assert np.array_equal(mask, np.where(middle, 128, np.where(columns > 3, 255, 0)))
    assert told["lesion_fraction"] == pytest.approx(1 / 3)
    evidence = told["evidence"]
    assert evidence["abstained_fraction"] == pytest.approx(1 / 3)
    assert "votes" not in evidence
    if mode == "certify":
        assert evidence["tau"] == 0.75
        assert evidence["radius"] == pytest.approx(0.1 * PHI.inv_cdf(0.75))
        assert evidence["radius_linf"] == pytest.approx(evidence["radius"] / math.sqrt(48))
        assert (evidence["n0"], evidence["n"], evidence["queries"]) == (20, 200, 220)
    else:
        assert not {"tau", "radius", "n0"} & set(evidence)
        assert (evidence["n"], evidence["queries"]) == (50, 50)
    assert other.headers["Content-Type"] == "image/png"
    assert np.array_equal(plane(other.content), mask)
    assert json.loads(other.headers["X-Evidence"]) == evidence


async def test_masks_of_tensors_carry_their_abstentions_as_labels() -> None:
    batch = images(3)
    upstream = Upstream(brighter_pixels)
    async with gateway(upstream, SIGMOID, **ALL, chunk=100) as http:
        parameters, outputs = outputs_of(await http.post("/predict?mode=certify", **tensor_request(batch)))
    assert outputs["probabilities"].shape == (3, 2, 8, 6)
    assert outputs["label"].shape == (3, 8, 6)
    assert outputs["label"].dtype == np.int64
    assert outputs["radius"].shape == outputs["radius_linf"].shape == (3,)
    assert parameters["evidence_tau"] == 0.75
    bright = (torch.from_numpy(np.concatenate(upstream.received)) > torch.sigmoid(torch.tensor(0.5))).long()
    for number, copies in enumerate(bright.unflatten(0, (3, 220))):
        selection, estimation = (torch.stack([(one == 0).sum(0), one.sum(0)]) for one in copies.split([20, 200]))
        expected = certify_mask_counts(selection, estimation, sigma=0.25, alpha=0.001, tau=0.75)
        assert np.array_equal(outputs["label"][number], expected.labels)
        assert outputs["radius"][number] == pytest.approx(expected.radius, rel=1e-6)
        assert np.array_equal(np.rint(outputs["probabilities"][number] * 200), estimation)
    assert {ABSTAIN, 0, 1} == set(outputs["label"].ravel().tolist())


async def test_a_gateway_may_offer_nothing_less_than_smoothing() -> None:
    async with gateway(Upstream(brighter_than(0.5)), SIGMOID, modes="certify,smooth", certify_n=50) as http:
        told = (await http.post("/predict", files={"file": grey(1.0)})).json()
        assert (told["evidence"]["mode"], told["evidence"]["n"]) == ("certify", 50)
        assert_error(await http.post("/predict?mode=sanitize", files={"file": grey(1.0)}), 400, "certify, smooth")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("mode=strongest", "query.mode"),
        ("mode=certify", "not offered here; choose from: sanitize, smooth"),
        ("mode=smooth&n=51", "between 11"),
        ("mode=smooth&n=10", "between 11"),
        ("mode=smooth&n=-1", "query.n"),
        ("mode=smooth&n=many", "query.n"),
        ("n=20", "n has no meaning"),
        ("dry_run=perhaps", "query.dry_run"),
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/v2/models/defended/infer"])
async def test_what_may_not_be_chosen_is_refused_with_the_reason(query: str, words: str, path: str) -> None:
    upstream = Upstream()
    async with gateway(upstream, modes="sanitize,smooth", smooth_n=50) as http:
        assert_error(await http.post(f"{path}?{query}", **tensor_request(images(1))), 400, words)
    assert upstream.requests == 0


async def test_fewer_copies_may_be_asked_for_and_that_is_what_is_said() -> None:
    upstream = Upstream(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL) as http:
        told = (await http.post("/predict?mode=certify&n=30", files={"file": grey(1.0)})).json()
    assert (told["evidence"]["n0"], told["evidence"]["n"], told["evidence"]["queries"]) == (20, 30, 50)
    assert told["evidence"]["radius"] == pytest.approx(0.25 * PHI.inv_cdf(0.001 ** (1 / 30)))
    assert len(upstream.received) == 50


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize(
    ("query", "each"), [("", 1), ("mode=smooth", 50), ("mode=smooth&n=11", 11), ("mode=certify", 220)]
)
async def test_the_cost_is_told_before_and_it_is_the_cost(query: str, each: int, shadow: bool) -> None:
    upstream = Upstream(brighter_than(0.5))
    cost = 3 * (each + shadow)
    async with gateway(upstream, SIGMOID, **ALL, budget=2000, usage=True, shadow=shadow, chunk=64) as http:
        key = {"X-API-Key": "ours"}
        ask = tensor_request(images(3))
        ask["headers"] |= key
        parameters = (await http.post(f"/predict?{query}&dry_run=true", **ask)).json()["parameters"]
        assert parameters["dry_run"] is True
        assert parameters["images"] == 3
        assert parameters["evidence_queries"] == cost
        assert parameters["budget_left"] == 2000
        quoted = await http.post(f"/predict?{query}&dry_run=true", files={"file": grey(1.0)}, headers=key)
        assert quoted.json()["evidence"]["queries"] == each + shadow
        assert quoted.json()["images"] == 1
        assert quoted.json()["budget"] == {"queries": 2000, "window_s": None, "left": 2000, "resets_in_s": None}
        assert upstream.requests == 0
        assert (await http.get("/queries")).json() == {"queries": {}, "gateway": {}, "keys": {}}
        parameters, _ = outputs_of(await http.post(f"/predict?{query}", **ask))
        assert parameters["evidence_queries"] == cost
        await eventually(lambda: len(upstream.received) == cost)
        told = (await http.get("/queries")).json()
        (account,) = told["keys"].values()
        mode = parameters["evidence_mode"]
        assert account["queries"] == {mode: 3 * each, **({"shadow": 3} if shadow else {})}
        assert account["budget"]["left"] == 2000 - cost
        assert told["queries"] == account["queries"]


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.002)


async def test_a_dry_run_of_tensors_has_the_form_of_an_answer_without_outputs() -> None:
    async with gateway(Upstream(), **ALL) as http:
        told = (await http.post("/v2/models/defended/infer?dry_run=1&mode=certify", **tensor_request(images(2)))).json()
        assert (told["model_name"], told["model_version"], told["outputs"]) == ("defended", "1", [])
        assert told["parameters"]["evidence_queries"] == 440
        assert "budget_left" not in told["parameters"]
        assert_error(await http.post("/predict?dry_run=1", content=b"{"), 400)


async def test_a_key_that_has_spent_its_budget_is_refused_and_others_are_not() -> None:
    upstream = Upstream()
    async with gateway(upstream, budget=5, usage=True) as http:

        async def ask(count: int, key: str | None) -> httpx.Response:
            question = tensor_request(images(count))
            return await http.post(
                "/predict",
                content=question["content"],
                headers=question["headers"] | ({"X-API-Key": key} if key else {}),
            )

        assert (await ask(3, "ours")).status_code == 200
        refused = await ask(3, "ours")
        assert_error(refused, 429, "costs 3 victim queries, and 2 are left of this key's budget of 5")
        assert "Retry-After" not in refused.headers, "it never comes back"
        assert_error(await ask(6, "ours"), 429, "more than the whole budget of 5")
        assert (await ask(2, "ours")).status_code == 200
        for key in ("theirs", None):
            assert (await ask(5, key)).status_code == 200
            assert_error(await ask(1, key), 429)
        assert len(upstream.received) == 15
        told = (await http.get("/queries")).json()
        assert told["queries"] == {"sanitize": 15}
        assert sorted(account["refused"] for account in told["keys"].values()) == [1, 1, 2]
        assert "ours" not in json.dumps(told)


async def test_a_windows_budget_says_when_to_come_back() -> None:
    async with gateway(Upstream(), budget=1, budget_window_s=0.2) as http:
        assert (await http.post("/predict", **tensor_request(images(1)))).status_code == 200
        refused = await http.post("/predict", **tensor_request(images(1)))
        assert_error(refused, 429, "0 are left")
        assert refused.headers["Retry-After"] == "1"
        await asyncio.sleep(0.2)
        assert (await http.post("/predict", **tensor_request(images(1)))).status_code == 200


async def test_a_victim_that_fails_midway_is_an_error_and_what_was_sent_is_counted() -> None:
    def fails_at_third(request: httpx.Request) -> httpx.Response:
        if upstream.requests == 3:
            return httpx.Response(503, headers={"Retry-After": "9"}, json={"error": "secret"})
        return brighter_than(0.5)(request)

    upstream = Upstream(fails_at_third)
    async with gateway(upstream, SIGMOID, **ALL, chunk=30, budget=400, usage=True) as http:
        response = await http.post("/predict?mode=certify", files={"file": grey(1.0)})
        assert_error(response, 503)
        assert "secret" not in response.text
        assert response.headers["Retry-After"] == "9"
        assert not {"X-Evidence", "X-Artifact-Id"} & {name.title() for name in response.headers}
        told = (await http.get("/queries")).json()["keys"]["anonymous"]
        assert told["queries"] == {"certify": 90}
        assert told["budget"]["left"] == 310
        assert upstream.requests == 3


async def test_what_could_not_be_sent_costs_nothing() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    upstream = Upstream(away)
    async with gateway(upstream, SIGMOID, **ALL, budget=1000, usage=True) as http:
        for query in ("", "mode=smooth", "mode=certify"):
            assert_error(await http.post(f"/predict?{query}", **tensor_request(images(2))), 502)
        refused = await http.post("/predict", **tensor_request(images(2)))
        assert_error(refused, 503, "was not asked")
        assert int(refused.headers["Retry-After"]) >= 1
        told = (await http.get("/queries")).json()["keys"]["anonymous"]
        assert set(told["queries"].values()) == {0}
        assert told["budget"]["left"] == 1000
    upstream.fails = lambda _: httpx.Response(504)
    async with gateway(upstream, SIGMOID, usage=True) as http:
        assert_error(await http.post("/predict", **tensor_request(images(2))), 504)
        assert (await http.get("/queries")).json()["keys"]["anonymous"]["queries"]["sanitize"] == 2


async def test_what_the_gateway_asks_for_itself_is_counted_as_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKOFF_FIRST_S", "BACKOFF_LAST_S"):  # however slow the machine, who broke is not tried again
        monkeypatch.setattr(replicas, name, 600.0)
    monkeypatch.setattr(pool.random, "random", lambda: 0.0)  # of equals the first is asked

    def one_breaks(request: httpx.Request) -> httpx.Response:
        if request.url.host == "breaks":
            raise httpx.ReadError("broken")
        return brighter_than(0.5)(request)

    upstream = Upstream(one_breaks)
    upstream.describes = named("day", "night")
    async with gateway(
        upstream, SIGMOID, **ALL, labels=(), usage=True, victim_url="http://breaks,http://works", budget=100
    ) as http:
        await http.get("/v2/models/defended")
        told = (await http.post("/predict?mode=smooth", files={"file": grey(1.0)})).json()
        assert (told["label"], told["labels"]) == ("night", ["day", "night"])
        queries = (await http.get("/queries")).json()
        assert queries["keys"]["anonymous"]["queries"] == {"smooth": 50}
        assert queries["gateway"] == {"shape": 1, "labels": 1, "resent": 1}
    assert len(upstream.received) == 50 + 3


async def test_the_queries_of_all_keys_are_not_for_everyone() -> None:
    async with gateway(Upstream()) as http:
        assert_error(await http.get("/queries"), 404)


async def test_shadow_answers_are_compared_and_never_returned() -> None:
    """The sanitizer inverts, the victim answers class 0 to bright images: the two always disagree."""
    upstream = Upstream()
    async with gateway(upstream, usage=True, shadow=True) as http:
        with_shadow = await http.post("/predict", files={"file": grey(1.0)})
        await eventually(lambda: len(upstream.received) == 2)
        assert with_shadow.json()["label"] == "dark"
        assert with_shadow.json()["evidence"] == {"mode": "sanitize", "queries": 2}
        assert [float(image.mean()) for image in upstream.received] == [0, 1]
        batch = np.stack([np.full((1, 8, 6), level, np.float32) for level in (0.0, 0.4999, 0.5)])
        await http.post("/predict", **tensor_request(batch))
        await eventually(lambda: len(upstream.received) == 8)

        async def told() -> dict[str, int]:
            counts: dict[str, int] = (await http.get("/queries")).json()["keys"]["anonymous"]["shadow"]
            return counts

        async with asyncio.timeout(5):
            while (await told()).get("agreed") != 1:
                await asyncio.sleep(0.002)
        assert await told() == {"agreed": 1, "disagreed": 3}
    async with gateway(Upstream()) as http:
        without = await http.post("/predict", files={"file": grey(1.0)})
    for one in ("label", "labels", "probabilities", "artifact"):
        assert with_shadow.json()[one] == without.json()[one]


@pytest.mark.parametrize("mode", ["sanitize", "smooth"])
async def test_masks_are_compared_with_their_shadows(mode: str) -> None:
    upstream = Upstream(segmenting)
    identity = Answers(lambda batch: batch.clamp(0, 1))
    async with gateway(upstream, identity, **ALL, sigma=0.01, usage=True, shadow=True) as http:
        bright = np.float32(images(2) > 0.5) * 0.8 + 0.1
        await http.post(f"/predict?mode={mode}", **tensor_request(bright))

        async def agreed() -> int:
            return int((await http.get("/queries")).json()["keys"]["anonymous"]["shadow"].get("agreed", 0))

        async with asyncio.timeout(5):
            while await agreed() != 2:
                await asyncio.sleep(0.002)


@pytest.mark.parametrize("failure", [httpx.Response(503), httpx.Response(200, content=b"garbage"), None])
async def test_a_failing_shadow_fails_nothing(failure: httpx.Response | None) -> None:
    def only_sanitized(request: httpx.Request) -> httpx.Response:
        if upstream.requests == 1:
            return brighter_than(0.5)(request)
        if failure is None:
            raise httpx.ReadTimeout("late")
        return failure

    upstream = Upstream(only_sanitized)
    async with gateway(upstream, SIGMOID, usage=True, shadow=True) as http:
        response = await http.post("/predict", files={"file": grey(1.0)})
        assert response.json()["label"] == "dark"
        await eventually(lambda: upstream.requests == 2)

        async def failed() -> bool:
            told = (await http.get("/queries")).json()["keys"]["anonymous"]
            return bool(told["shadow"] == {"failed": 1} and told["queries"] == {"sanitize": 1, "shadow": 1})

        async with asyncio.timeout(5):
            while not await failed():
                await asyncio.sleep(0.002)


async def test_an_answer_does_not_wait_for_its_shadow_and_the_end_does_not_either() -> None:
    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.requests:
                await asyncio.sleep(60)
            return await super().handle_async_request(request)

    async with asyncio.timeout(10), gateway(Slow(), shadow=True) as http:
        assert (await http.post("/predict", files={"file": grey(1.0)})).status_code == 200


async def test_many_copies_are_no_traffic_jam() -> None:
    """A request of more copies than the queue holds is answered while ordinary ones fill it, and delays none."""
    gate = asyncio.Event()

    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.requests == 0:
                self.requests += 1
                await gate.wait()
            return await super().handle_async_request(request)

    upstream = Slow(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL, max_queue=8, chunk=32, max_copies=300) as http:
        full = asyncio.create_task(http.post("/predict", **tensor_request(images(8))))
        await eventually(lambda: upstream.requests == 1)
        assert_error(await http.post("/predict", **tensor_request(images(1))), 429, "8 images are in work")
        assert (await http.post("/predict?mode=certify", files={"file": grey(1.0)})).status_code == 200
        gate.set()
        assert (await full).status_code == 200


async def test_copies_have_a_queue_of_their_own_and_it_ends() -> None:
    gate = asyncio.Event()

    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.requests += 1
            if len(await request.aread()) > 5000:  # copies
                await gate.wait()
            return await super().handle_async_request(request)

    upstream = Slow(brighter_than(0.5))
    async with gateway(upstream, SIGMOID, **ALL, max_copies=300, max_batch=256, usage=True) as http:
        certify = asyncio.create_task(http.post("/predict?mode=certify", files={"file": grey(1.0)}))
        await eventually(lambda: upstream.requests > 0)
        refused = await http.post("/predict?mode=certify", files={"file": grey(1.0)})
        assert_error(refused, 429, "220 images are in work")
        assert "Retry-After" in refused.headers
        assert (await http.post("/predict", **tensor_request(images(8)))).status_code == 200
        gate.set()
        assert (await certify).status_code == 200
        assert (await http.get("/queries")).json()["queries"]["certify"] == 220


async def test_metadata_tells_the_outputs_of_the_first_mode_and_of_any_other() -> None:
    probabilities = {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2, 8, 6]}
    label = {"name": "label", "datatype": "INT64", "shape": [-1, 8, 6]}
    radii = [{"name": name, "datatype": "FP32", "shape": [-1]} for name in ("radius", "radius_linf")]
    async with gateway(Upstream(segmenting), **ALL) as http:

        async def outputs(query: str) -> Any:
            return (await http.get(f"/v2/models/defended{query}")).json()["outputs"]

        assert await outputs("") == await outputs("?mode=sanitize") == [probabilities]
        assert await outputs("?mode=smooth") == [probabilities, label]
        assert await outputs("?mode=certify") == [probabilities, label, *radii]
        told = (await http.get("/v2/models/defended")).json()
        assert told["parameters"]["modes"] == "sanitize,smooth,certify"
    async with gateway(Upstream(), modes="smooth") as http:
        told = (await http.get("/v2/models/defended")).json()
        assert [one["shape"] for one in told["outputs"]] == [[-1, 2], [-1]]
        assert_error(await http.get("/v2/models/defended?mode=certify"), 400, "not offered")


async def test_what_metadata_announce_is_what_is_answered() -> None:
    for victim in (brighter_than(0.5), brighter_pixels):
        async with gateway(Upstream(victim), SIGMOID, **ALL) as http:
            for mode in ("sanitize", "smooth", "certify"):
                announced = (await http.get(f"/v2/models/defended?mode={mode}")).json()["outputs"]
                _, outputs = outputs_of(await http.post(f"/predict?mode={mode}", **tensor_request(images(3))))
                assert {one["name"]: (one["datatype"], one["shape"][1:]) for one in announced} == {
                    name: (oip.Tensor(name, array).datatype, list(array.shape[1:])) for name, array in outputs.items()
                }


async def test_the_document_tells_what_may_be_asked_and_answered() -> None:
    async with gateway(Upstream(), **ALL, docs=True, usage=True) as http:
        document = (await http.get("/openapi.json")).json()
    for path in ("/predict", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        told = document["paths"][path]["post"]
        asked = {(one["in"], one["name"]): one for one in told["parameters"]}
        for one in (("query", "mode"), ("query", "n"), ("query", "dry_run")):
            assert asked[one]["description"]
        assert told["security"] == [{"APIKeyHeader": []}, {"HTTPBearer": []}]
        (choice, _) = asked["query", "mode"]["schema"]["anyOf"]
        assert choice["enum"] == ["sanitize", "smooth", "certify"]
        expected = (200, 400, 401, 404, 413, 415, 429, 500, 501, 502, 503, 504)
        assert {str(status) for status in expected} <= set(told["responses"])
        assert "422" not in told["responses"], "what FastAPI calls 422 is answered 400 here"
        assert set(told["responses"]["200"]["headers"]) == {"X-Artifact-Id", "X-Evidence"}
    assert "/queries" in document["paths"]


async def test_nobody_is_asked_for_a_client_that_has_gone() -> None:
    upstream = Upstream(brighter_than(0.5))
    artifact: Any = SimpleNamespace(
        sanitizer=SIGMOID,
        manifest=SimpleNamespace(
            id="x",
            name="x",
            sigma=0.25,
            queries_spent=0,
            labels=[],
            input=SimpleNamespace(channels=1, height=8, width=6),
        ),
    )
    settings = GatewaySettings(artifact="unused", victim_url="http://victim", device="cpu", **ALL)
    app = make_gateway(Version("1", artifact), settings, transport=upstream)
    question = tensor_request(images(1))
    events = iter([{"type": "http.request", "body": question["content"]}, {"type": "http.disconnect"}])
    answered: list[Any] = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"mode=smooth",
        "headers": [(name.lower().encode(), value.encode()) for name, value in question["headers"].items()],
    }
    async with serving(app):
        await app(scope, receive, send)
    assert answered[0]["status"] == 499
    assert upstream.requests == 0


async def test_sanitize_stays_as_it_was_beside_the_other_modes() -> None:
    batch = images(5)
    upstream = Upstream()
    async with gateway(upstream, **ALL) as http:
        default = await http.post("/predict", **tensor_request(batch))
        chosen = await http.post("/predict?mode=sanitize", **tensor_request(batch))
    assert np.array_equal(scores_of(default), scores_of(chosen))
    assert len(upstream.received) == 10
    assert np.array_equal(np.stack(upstream.received[:5]), 1 - batch)
