"""Faults, on purpose: whatever happens, every request is answered rightly, or its sender is told of an error.

`make chaos` runs this for many rounds (CHAOS_ROUNDS); the ordinary test run has one. docs/reliability.md tells of it.
"""

import os
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import trustme
from service_processes import Process, Start, images, stop

from defense.sanitizer import Sanitizer
from services.protocol import oip

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
ERRORS = {429, 502, 503, 504}
BATCH = images(8)


class Victim:
    """A victim that behaves as it is told to, on a socket."""

    def __init__(self) -> None:
        self.behaviour: str | Sequence[str] = "good"
        self.received = 0
        self.left_alone = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, b"{}")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received += 1
                behaviour = outer.behaviour
                if not isinstance(behaviour, str):
                    behaviour = random.choice(behaviour)
                array = oip.decode_request(body, int(self.headers[oip.HEADER])).inputs[0].array
                self.close_connection = behaviour in ("truncated", "reset", "hangs", "no http")
                getattr(self, f"_{behaviour.replace(' ', '_')}")(scores_of(array))

            def _good(self, scores: np.ndarray) -> None:
                outputs = [(oip.Tensor(oip.OUTPUT, scores), True)]
                body, headers = oip.encode_response(outputs, model_name="v", model_version="1")
                self._send(200, body, headers)

            def _slow(self, scores: np.ndarray) -> None:
                time.sleep(0.5)
                self._good(scores)

            def _garbage(self, scores: np.ndarray) -> None:
                self._send(200, random.randbytes(len(scores) * 8), {"Content-Type": oip.BINARY_TYPE, oip.HEADER: "5"})

            def _not_finite(self, scores: np.ndarray) -> None:
                self._good(scores * np.float32("nan"))

            def _too_few(self, scores: np.ndarray) -> None:
                self._good(scores[:-1])

            def _internal_error(self, _scores: np.ndarray) -> None:
                self._send(500, b"<h1>secrets of the inside</h1>")

            def _overloaded(self, _scores: np.ndarray) -> None:
                self._send(429, b'{"error": "later"}', {"Retry-After": "1"})

            def _truncated(self, scores: np.ndarray) -> None:
                body, headers = oip.encode_response(
                    [(oip.Tensor(oip.OUTPUT, scores), True)], model_name="v", model_version="1"
                )
                self.send_response(200)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])

            def _reset(self, _scores: np.ndarray) -> None:
                self.connection.shutdown(socket.SHUT_RDWR)

            def _no_http(self, _scores: np.ndarray) -> None:
                self.wfile.write(b"\x00\xff" * 100)

            def _hangs(self, _scores: np.ndarray) -> None:
                self.connection.recv(1)  # returns when the other end closes
                outer.left_alone.set()

            def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_words: object) -> None:
                """Says nothing."""

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client is gone
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def scores_of(batch: np.ndarray) -> np.ndarray:
    """Three scores that tell images apart."""
    mean = batch.mean(axis=(1, 2, 3), dtype=np.float32)
    left = batch[..., :16].mean(axis=(1, 2, 3), dtype=np.float32)
    return np.stack([mean, left, 1 - mean], axis=1)


@pytest.fixture
def fake() -> Iterator[Victim]:
    victim = Victim()
    yield victim
    victim.close()


@pytest.fixture
def right(artifact: tuple[Path, Sanitizer]) -> np.ndarray:
    """The right answers to `BATCH` from a gateway in front of the fake victim."""
    with torch.inference_mode():
        return scores_of(artifact[1](BATCH).numpy())


def ask(http: httpx.Client, url: str, index: int, right: np.ndarray) -> str:
    """Asks about one image: "right", a status, or "cut off"; a wrong answer, or an error in another form, fails."""
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, BATCH[index : index + 1].numpy())])
    try:
        response = http.post(f"{url}/predict", content=body, headers=headers)
    except httpx.TransportError:
        return "cut off"
    if response.status_code != 200:
        told = response.json()
        assert set(told) == {"error"}
        assert "secrets" not in told["error"]
        return str(response.status_code)
    scores = oip.decode_response(response.content, oip.header_length(response.headers.get(oip.HEADER)))[oip.OUTPUT]
    assert np.allclose(scores, right[index], atol=1e-4), "a wrong answer left the gateway"
    return "right"


def burst(url: str, right: np.ndarray, count: int, *, then: Callable[[], object] = lambda: None) -> list[str]:
    """What becomes of so many requests at once; `then` happens in the middle."""
    limits = httpx.Limits(max_connections=count)
    with httpx.Client(timeout=60, limits=limits) as http, ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(ask, http, url, index % len(BATCH), right) for index in range(count)]
        then()
        return [future.result() for future in futures]


def kill_soon(process: Process) -> None:
    time.sleep(random.uniform(0, 0.2))
    process.kill()


def back_again(url: str, right: np.ndarray) -> None:
    """Waits until the gateway answers rightly once more."""
    deadline = time.monotonic() + 60
    while set(burst(url, right, 4)) != {"right"}:
        assert time.monotonic() < deadline, "it did not recover"
        time.sleep(0.2)


FAULTS = ("garbage", "not finite", "too few", "internal error", "truncated", "reset", "no http", "hangs")


def test_whatever_the_victim_does_no_wrong_answer_leaves_and_it_recovers(
    start: Start, artifact: tuple[Path, Sanitizer], fake: Victim, right: np.ndarray
) -> None:
    flags = ["--victim-url", fake.url, "--timeout-s", "1"]
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), *flags)
    for _ in range(ROUNDS):
        for fault in random.sample(FAULTS, len(FAULTS)):
            fake.behaviour = fault
            told = burst(url, right, 12)
            assert {int(one) for one in told} <= ERRORS, (fault, told)
            fake.behaviour = "good"
            back_again(url, right)
        fake.behaviour = ("good", "good", "slow", *FAULTS[:-1])
        told = burst(url, right, 60)
        assert {int(one) for one in told if one != "right"} <= ERRORS, told
        fake.behaviour = "slow"
        back_again(url, right)
        fake.behaviour = "overloaded"
        assert set(burst(url, right, 4)) == {"429"}, "overload keeps its meaning"
        fake.behaviour = "good"
        back_again(url, right)
    assert "Traceback" not in stop(gateway)


def test_with_half_of_the_replicas_gone_everything_is_answered(
    start: Start, artifact: tuple[Path, Sanitizer], right: np.ndarray
) -> None:
    replicas = [Victim(), Victim()]
    urls = ",".join(one.url for one in replicas)
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", urls)
    assert set(burst(url, right, 20)) == {"right"}
    assert all(one.received for one in replicas)
    for one in replicas:
        one.behaviour = "slow"
    told = burst(url, right, 10, then=lambda: (time.sleep(0.2), replicas[0].close()))
    assert set(told) == {"right"}, told
    assert set(burst(url, right, 20)) == {"right"}
    assert "Traceback" not in stop(gateway)
    replicas[1].close()


def test_a_victim_that_is_killed_stopped_and_started_again(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    with torch.inference_mode():
        right = victim[1](artifact[1](BATCH)).softmax(dim=1).numpy()
    hospital, hospital_url = start("services.hospital", "--model", str(victim[0]))
    flags = ["--victim-url", hospital_url, "--timeout-s", "2"]
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), *flags)
    back_again(url, right)
    for _ in range(ROUNDS):
        hospital.send_signal(signal.SIGSTOP)
        assert {int(one) for one in burst(url, right, 6)} <= ERRORS
        hospital.send_signal(signal.SIGCONT)
        back_again(url, right)
        told = burst(url, right, 30, then=partial(kill_soon, hospital))
        assert {int(one) for one in told if one != "right"} <= ERRORS, told
        hospital.communicate()
        hospital, _ = start("services.hospital", "--model", str(victim[0]), "--port", hospital_url.rpartition(":")[2])
        back_again(url, right)
    assert "Traceback" not in stop(gateway)


def test_a_gateway_that_is_killed_leaves_nobody_with_a_wrong_answer_and_no_victim_broken(
    start: Start, artifact: tuple[Path, Sanitizer], fake: Victim, right: np.ndarray
) -> None:
    flags = ["--artifact", str(artifact[0]), "--victim-url", fake.url]
    gateway, url = start("services.gateway", *flags)
    for _ in range(ROUNDS):
        back_again(url, right)
        told = burst(url, right, 40, then=partial(kill_soon, gateway))
        assert set(told) <= {"right", "cut off"}, told
        gateway.communicate()
        gateway, _ = start("services.gateway", *flags, "--port", url.rpartition(":")[2])
    back_again(url, right)


def test_a_gateway_that_is_told_to_end_answers_what_it_accepted(
    start: Start, artifact: tuple[Path, Sanitizer], fake: Victim, right: np.ndarray
) -> None:
    victims = ",".join([fake.url] * 4)  # which hold two requests each, so that all of them can be seen there
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", victims)
    fake.behaviour = "slow"

    def all_are_at_the_victim() -> None:
        deadline = time.monotonic() + 30
        while fake.received < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gateway.send_signal(signal.SIGTERM)

    assert burst(url, right, 8, then=all_are_at_the_victim) == ["right"] * 8
    assert "Traceback" not in gateway.communicate(timeout=30)[1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/v2/health/live")


def test_a_client_that_hangs_up_ends_the_work_at_the_victim_too(
    start: Start, artifact: tuple[Path, Sanitizer], fake: Victim, right: np.ndarray
) -> None:
    _, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", fake.url, "--max-queue", "1")
    fake.behaviour = "hangs"
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, BATCH[:1].numpy())])
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/predict", content=body, headers=headers, timeout=1)
    assert fake.left_alone.wait(30)
    fake.behaviour = "good"
    with httpx.Client() as http:
        assert ask(http, url, 0, right) == "right", "its place in the queue is free again"


def test_both_hops_may_be_encrypted(
    start: Start,
    victim: tuple[Path, torch.nn.Module],
    artifact: tuple[Path, Sanitizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ["--tls-cert", str(tmp_path / "server.pem")]
    _, hospital_url = start("services.hospital", "--model", str(victim[0]), *tls)
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url, *tls)
    assert url.startswith("https://")
    with torch.inference_mode():
        right = victim[1](artifact[1](BATCH)).softmax(dim=1).numpy()
    with httpx.Client(verify=ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))) as http:
        assert ask(http, url, 3, right) == "right"
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(httpx.ConnectError), httpx.Client() as http:
        http.get(f"{url}/v2/health/live")
    assert "Traceback" not in stop(gateway)
