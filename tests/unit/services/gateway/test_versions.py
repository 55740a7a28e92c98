"""Versions that change while the gateway answers: each answer is of one of them, and of one that passed its test."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gateway_fakes import Answers, Upstream, images, named, scored, segmenting
from service_fakes import assert_error, scores_of, serving, tensor_request

from defense.errors import ArtifactError
from services.gateway.app import make_gateway
from services.gateway.config import GatewaySettings
from services.gateway.repository import Version
from services.protocol import oip
from services.protocol.errors import InvalidInput
from services.protocol.images import encode_png

pytestmark = pytest.mark.anyio

TOKEN = "a token of the operator"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
SCAN = {"file": encode_png(np.full((1, 8, 6), 0.5, np.float32))}
LOAD = "/v2/repository/models/defended/load"
ROLLBACK = "/v2/repository/models/defended/rollback"


def version(
    number: str, level: float, *, size: tuple[int, int] = (8, 6), labels: tuple[str, ...] = ("a", "b")
) -> Version:
    """A version whose sanitizer turns everything into one grey: the victim's scores tell which one was asked."""
    artifact: Any = SimpleNamespace(
        sanitizer=Answers(lambda batch: torch.full_like(batch, level)),
        manifest=SimpleNamespace(
            id=f"sha256-{level}",
            name="ours",
            sigma=0.25,
            queries_spent=1,
            labels=list(labels),
            input=SimpleNamespace(channels=1, height=size[0], width=size[1]),
        ),
    )
    return Version(number, artifact)


class Shelf:
    """A repository in memory."""

    def __init__(self, *versions: Version) -> None:
        self.versions = {one.number: one for one in versions}
        self.fails: ArtifactError | None = None
        self.gate: Any = None  # a threading.Event that a load waits for

    def numbers(self) -> tuple[str, ...]:
        return tuple(sorted(self.versions, key=int))

    def load(self, number: str | None = None) -> Version:
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.fails is not None:
            raise self.fails
        return self.versions[number or self.numbers()[-1]]


@asynccontextmanager
async def gateway(shelf: Shelf, upstream: httpx.AsyncBaseTransport, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    fixed = {"artifact": "unused", "victim_url": "http://victim", "device": "cpu", "max_delay_ms": 0, "usage": True}
    settings = GatewaySettings(**{**fixed, "admin_token": TOKEN, "detection": "off", **changes})
    first = shelf.versions[shelf.numbers()[0]]
    async with serving(make_gateway(first, settings, repository=shelf, transport=upstream)) as http:  # type: ignore[arg-type]
        yield http


async def served(http: httpx.AsyncClient) -> tuple[str, float]:
    """The version that an answer names, and the grey that its scores tell."""
    response = await http.post("/predict", files=SCAN)
    assert response.status_code == 200, response.text
    told = response.json()
    assert told["artifact"]["id"] == response.headers["X-Artifact-Id"] == f"sha256-{told['probabilities'][0]:.1f}"
    return told["artifact"]["version"], round(told["probabilities"][0], 3)


async def test_a_new_version_answers_once_it_is_loaded_and_the_one_before_once_it_is_rolled_back() -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4), version("3", 0.6))
    async with gateway(shelf, Upstream()) as http:
        assert await served(http) == ("1", 0.2)
        loaded = await http.post(LOAD, headers=ADMIN)
        assert loaded.json() == {"name": "defended", "version": "3", "state": "READY", "artifact": "sha256-0.6"}
        assert await served(http) == ("3", 0.6)
        assert (await http.post(LOAD, headers=ADMIN, json={"parameters": {"version": "2"}})).status_code == 200
        assert await served(http) == ("2", 0.4)
        assert (await http.post(ROLLBACK, headers=ADMIN)).json()["version"] == "3"
        assert await served(http) == ("3", 0.6)
        assert (await http.post(ROLLBACK, headers=ADMIN)).json()["version"] == "2"
        assert await served(http) == ("2", 0.4)
        told = (await http.post("/v2/repository/index", headers=ADMIN)).json()
        assert [(one["version"], one["state"]) for one in told] == [
            ("1", "UNAVAILABLE"),
            ("2", "READY"),
            ("3", "UNAVAILABLE"),
        ]


async def test_every_answer_is_of_the_one_version_it_names_whatever_changes_meanwhile() -> None:
    shelf = Shelf(*(version(str(number), number / 10) for number in range(1, 6)))

    class Slow(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await super().handle_async_request(request)
            await asyncio.sleep(0.002)
            return response

    seen: set[str] = set()

    async def client(http: httpx.AsyncClient) -> None:
        for _ in range(30):
            number, level = await served(http)
            assert level == pytest.approx(int(number) / 10)
            seen.add(number)

    async with gateway(shelf, Slow(), max_delay_ms=3) as http:
        clients = [asyncio.create_task(client(http)) for _ in range(8)]
        for number in [2, 3, 1, 5, 4, 3, 2, 5]:
            changed = await http.post(LOAD, headers=ADMIN, json={"parameters": {"version": str(number)}})
            assert changed.status_code == 200, changed.text
            await asyncio.sleep(0.01)
            assert (await http.post(ROLLBACK, headers=ADMIN)).status_code == 200
        await asyncio.gather(*clients)
    assert len(seen) > 2


async def test_tensors_and_metadata_name_the_version_and_others_are_not_found() -> None:
    shelf = Shelf(version("4", 0.2), version("7", 0.4))
    async with gateway(shelf, Upstream()) as http:
        await http.post(LOAD, headers=ADMIN)
        request = tensor_request(images(2))
        answer = await http.post("/v2/models/defended/versions/7/infer", **request)
        assert scores_of(answer)[:, 0] == pytest.approx(0.4)
        assert b'"model_version":"7"' in answer.content
        assert (await http.get("/v2/models/defended")).json()["versions"] == ["7"]
        assert (await http.get("/v2/models/defended/versions/7/ready")).status_code == 200
        old = await http.post("/v2/models/defended/versions/4/infer", **request)
        assert_error(old, 404, "version '4' of 'defended' is not served; the version here is '7'")


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (version("2", 0.4, size=(8, 8)), "start another gateway"),
        (version("2", 0.4, labels=("a", "c")), "was learned for the classes"),
        (version("2", 2.0), "500"),
    ],
)
async def test_a_version_that_does_not_fit_is_not_taken(candidate: Version, words: str) -> None:
    async with gateway(Shelf(version("1", 0.2), candidate), Upstream()) as http:
        refused = await http.post(LOAD, headers=ADMIN)
        assert (refused.status_code, words in refused.text) in {(409, True), (500, False)}
        assert await served(http) == ("1", 0.2)
        assert_error(await http.post(ROLLBACK, headers=ADMIN), 409, "no other version")


async def test_a_version_that_is_not_whole_is_not_taken() -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    shelf.fails = ArtifactError("its SHA-256 is not the one in the manifest")
    async with gateway(shelf, Upstream()) as http:
        assert_error(await http.post(LOAD, headers=ADMIN), 409, "SHA-256")
        assert await served(http) == ("1", 0.2)


async def test_a_version_that_is_not_there_is_not_found() -> None:
    async with gateway(Shelf(version("1", 0.2)), Upstream()) as http:
        missing = await http.post(LOAD, headers=ADMIN, json={"parameters": {"version": "9"}})
        assert_error(missing, 404, "no version '9'; there are 1")
        assert (await http.post(LOAD, headers=ADMIN, json={"parameters": {"versoin": "1"}})).status_code == 400
        assert_error(await http.post("/v2/repository/models/other/load", headers=ADMIN), 404, "unknown model")
        assert_error(await http.post("/v2/repository/models/defended/unload", headers=ADMIN), 501, "always serves")


async def test_the_version_that_answers_is_not_loaded_again() -> None:
    upstream = Upstream()
    async with gateway(Shelf(version("1", 0.2)), upstream) as http:
        assert (await http.post(LOAD, headers=ADMIN)).json()["version"] == "1"
        assert upstream.requests == 0
        assert_error(await http.post(ROLLBACK, headers=ADMIN), 409, "no other version")


async def test_a_victim_that_is_away_lets_no_version_in() -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    upstream = Upstream()
    async with gateway(shelf, upstream) as http:
        upstream.fails = lambda _request: httpx.Response(503)
        assert (await http.post(LOAD, headers=ADMIN)).status_code == 503
        upstream.fails = None
        assert await served(http) == ("1", 0.2)
        assert (await http.get("/queries", headers=ADMIN)).json()["gateway"]["self-test"] == 4


async def test_two_loads_at_once_are_one_load_and_a_refusal() -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    shelf.gate = threading.Event()
    async with gateway(shelf, Upstream()) as http:
        first = asyncio.create_task(http.post(LOAD, headers=ADMIN))
        await asyncio.sleep(0.05)
        assert_error(await http.post(LOAD, headers=ADMIN), 409, "another version is being loaded")
        assert_error(await http.post(ROLLBACK, headers=ADMIN), 409, "another version is being loaded")
        assert await served(http) == ("1", 0.2), "the old one answers meanwhile"
        shelf.gate.set()
        assert (await first).status_code == 200
        assert await served(http) == ("2", 0.4)


def store(folder: Path, count: int) -> Path:
    (folder / "deep").mkdir(parents=True)
    for index in range(count):
        (folder / "deep" / f"{index}.png").write_bytes(encode_png(np.full((1, 8, 6), index / count, np.float32)))
    return folder


def bright(request: httpx.Request) -> httpx.Response:
    """Class 0 above one half, else class 1."""
    asked = oip.decode_request(request.content, oip.header_length(request.headers[oip.HEADER])).inputs[0].array
    is_bright = asked.mean(axis=(1, 2, 3)) > 0.5
    return scored(np.stack([is_bright, ~is_bright], axis=1).astype(np.float32))


async def test_stored_images_decide_by_the_share_that_is_answered_as_without_the_sanitizer(tmp_path: Path) -> None:
    """Of ten greys 0, 0.1, ..., 0.9 the victim calls five bright: a version that makes all dark agrees on five."""
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    folder = store(tmp_path / "stored", 10)
    async with gateway(shelf, Upstream(bright), self_test=folder, self_test_agreement=0.6) as http:
        refused = await http.post(LOAD, headers=ADMIN)
        assert_error(refused, 409, "version 2 failed its self-test: the model answers 50% of the 10 stored images")
        assert (await http.get("/v2/models/defended")).json()["versions"] == ["1"]
        assert (await http.get("/queries", headers=ADMIN)).json()["gateway"]["self-test"] == 20
    async with gateway(shelf, Upstream(bright), self_test=folder, self_test_agreement=0.5) as http:
        assert (await http.post(LOAD, headers=ADMIN)).status_code == 200


async def test_stored_images_of_a_segmenter_are_compared_by_their_masks(tmp_path: Path) -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    async with gateway(
        shelf, Upstream(segmenting), self_test=store(tmp_path / "stored", 4), self_test_agreement=1.0
    ) as http:
        assert_error(await http.post(LOAD, headers=ADMIN), 409, "50% of the 4 stored images")


async def test_a_folder_of_stored_images_has_to_hold_images(tmp_path: Path) -> None:
    for folder, words in ((tmp_path / "none", "holds 0 files"), (tmp_path / "text", "notes.txt cannot be used")):
        if folder.name == "text":
            folder.mkdir()
            (folder / "notes.txt").write_text("no image")
        with pytest.raises(InvalidInput, match=words):
            async with gateway(Shelf(version("1", 0.2)), Upstream(), self_test=folder):
                pass


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer another token"}, {"Authorization": TOKEN}])
async def test_the_repository_is_the_operators(headers: dict[str, str]) -> None:
    async with gateway(Shelf(version("1", 0.2), version("2", 0.4)), Upstream()) as http:
        for path in (LOAD, ROLLBACK, "/v2/repository/index", "/v2/repository/models/defended/unload"):
            refused = await http.post(path, headers=headers)
            assert_error(refused, 401, "the operator's")
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert await served(http) == ("1", 0.2)


async def test_without_a_token_there_is_no_such_path() -> None:
    async with gateway(Shelf(version("1", 0.2)), Upstream(), admin_token=None) as http:
        assert (await http.post(LOAD, headers=ADMIN)).status_code == 404
        assert "model_repository" not in (await http.get("/v2")).json()["extensions"]
    async with gateway(Shelf(version("1", 0.2)), Upstream()) as http:
        assert "model_repository" in (await http.get("/v2")).json()["extensions"]


async def test_a_hangup_loads_the_newest_and_a_bad_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    shelf = Shelf(version("1", 0.2), version("2", 0.4))
    upstream = Upstream()
    upstream.describes = named("a", "b")
    before = signal.getsignal(signal.SIGHUP)
    async with gateway(shelf, upstream) as http:
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            while await served(http) != ("2", 0.4):
                await asyncio.sleep(0.01)
        shelf.fails = ArtifactError("altered")
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            while "version 2 goes on answering: altered" not in caplog.text:
                await asyncio.sleep(0.01)
    assert signal.getsignal(signal.SIGHUP) == before
