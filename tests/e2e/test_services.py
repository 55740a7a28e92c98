"""The two services as people run them: as processes, on ports of their own choosing."""

import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from service_processes import Start, images, publish, stop

from defense.sanitizer import Sanitizer
from services.protocol.client import HTTPVictim
from services.protocol.errors import UpstreamUnreachable
from services.protocol.images import encode_png


def test_the_gateway_outlives_its_victim_and_says_what_is_wrong(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    hospital, hospital_url = start("services.hospital", "--model", str(victim[0]))
    _, gateway_url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url)
    with HTTPVictim([gateway_url]) as client:
        assert client(images(2)).shape == (2, 3)
        hospital.kill()
        hospital.communicate()
        with pytest.raises(UpstreamUnreachable, match="cannot be reached"):
            client(images(2))
        assert not client.ready()
        assert httpx.get(f"{gateway_url}/v2/health/live").status_code == 200
        start("services.hospital", "--model", str(victim[0]), "--port", hospital_url.rpartition(":")[2])
        assert client(images(2)).shape == (2, 3)


def test_bodies_beyond_the_bound_are_refused_over_a_socket(start: Start, victim: tuple[Path, torch.nn.Module]) -> None:
    _, url = start("services.hospital", "--model", str(victim[0]), "--max-body-mb", "1")
    for content in (b"x" * (2**20 + 1), iter([b"x" * 2**16] * 17)):
        response = httpx.post(f"{url}/predict", content=content)
        assert response.status_code == 413
        assert set(response.json()) == {"error"}
    assert httpx.get(f"{url}/v2/health/live").status_code == 200


def test_evidence_from_processes(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    _, hospital_url = start("services.hospital", "--model", str(victim[0]))
    modes = ["--modes", "sanitize,smooth,certify", "--smooth-n", "40", "--certify-n0", "20", "--certify-n", "80"]
    counting = ["--budget", "200", "--budget-window-s", "3600", "--usage", "--shadow"]
    gateway, url = start(
        "services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url, *modes, *counting
    )
    files = {"file": ("scan.png", encode_png(images(1)[0].numpy()), "image/png")}
    key = {"X-API-Key": "ward-7"}
    quote = httpx.post(f"{url}/predict?mode=certify&dry_run=true", files=files, headers=key).json()
    assert quote["evidence"]["queries"] == 101
    assert httpx.get(f"{url}/queries").json()["queries"] == {}
    told = httpx.post(f"{url}/predict?mode=certify", files=files, headers=key).json()
    evidence = told["evidence"]
    assert (evidence["n0"], evidence["n"], evidence["queries"], evidence["sigma"]) == (20, 80, 101, 0.25)
    assert sum(evidence["votes"]) == 80
    assert (told["label"] is None) == evidence["abstained"] == (evidence["radius"] == 0)
    told = httpx.post(f"{url}/predict?mode=smooth&n=30", files=files, headers=key).json()
    assert sum(told["evidence"]["votes"]) == told["evidence"]["n"] == 30
    refused = httpx.post(f"{url}/predict?mode=certify", files=files, headers=key)
    assert refused.status_code == 429
    assert "68 are left" in refused.json()["error"]
    assert 3500 < int(refused.headers["Retry-After"]) <= 3600
    assert httpx.post(f"{url}/predict?mode=certify", files=files).status_code == 200, "another client has its own"
    (ours,) = (one for name, one in httpx.get(f"{url}/queries").json()["keys"].items() if name != "anonymous")
    assert ours["queries"] == {"certify": 100, "smooth": 30, "shadow": 2}
    assert ours["refused"] == 1
    assert stop(gateway) == ""


def test_an_attack_by_queries_is_seen_and_refused(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    _, hospital_url = start("services.hospital", "--model", str(victim[0]))
    detection = ["--detection", "refuse", "--detection-near", "6", "--usage"]
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url, *detection)
    key = {"X-API-Key": "eve"}
    steps = [images(1)[0].numpy().clip(0, 1 - step / 255) for step in range(1, 9)]
    files = [{"file": ("scan.png", encode_png(step), "image/png")} for step in steps]
    statuses = [httpx.post(f"{url}/predict", files=file, headers=key).status_code for file in files]
    assert statuses == [200] * 5 + [429] * 3
    other = httpx.post(f"{url}/predict", files=files[7])
    assert other.status_code == 200, "another client has its own"
    keys = httpx.get(f"{url}/queries").json()["keys"]
    assert sorted(one["suspected"] for one in keys.values()) == [0, 3]
    assert "query attack suspected: sha256:" in stop(gateway)


def test_a_version_that_is_published_answers_after_a_hangup_and_is_rolled_back(
    start: Start, victim: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    first = publish(tmp_path / "defense" / "1", 1)
    _, hospital_url = start("services.hospital", "--model", str(victim[0]))
    flags = ["--artifact", str(tmp_path / "defense"), "--admin-token", "secret of the operator"]
    gateway, url = start("services.gateway", "--victim-url", hospital_url, *flags)

    def answers_of(sanitizer: Sanitizer) -> bool:
        with torch.inference_mode():
            expected = victim[1](sanitizer(images(4))).softmax(dim=1)
        with HTTPVictim([url]) as client:
            return torch.allclose(client(images(4)), expected, atol=1e-5)

    def version() -> str:
        return str(httpx.get(f"{url}/v2/models/defended").json()["versions"][0])

    assert (version(), answers_of(first)) == ("1", True)
    second = publish(tmp_path / "defense" / "2", 2)
    assert (version(), answers_of(second)) == ("1", False)
    gateway.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while version() != "2":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answers_of(second)
    operator = {"Authorization": "Bearer secret of the operator"}
    back = httpx.post(f"{url}/v2/repository/models/defended/rollback", headers=operator)
    assert back.json()["version"] == "1"
    assert answers_of(first)
    told = stop(gateway)
    assert "version 2 answers now" in told
    assert "secret of the operator" not in told


def test_a_mode_that_can_never_answer_is_refused_at_the_start(start: Start, artifact: tuple[Path, Sanitizer]) -> None:
    with pytest.raises(AssertionError, match="--certify-n 5 can never answer anything"):
        start(
            "services.gateway",
            *("--artifact", str(artifact[0]), "--victim-url", "http://127.0.0.1:9"),
            *("--modes", "certify", "--certify-n", "5"),
        )


class Collector:
    """Where OpenTelemetry's spans are sent; keeps them by service."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Any]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in told.resource_spans:
                    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
                    found = [span for scope in resource.scope_spans for span in scope.spans]
                    outer.spans.setdefault(attributes["service.name"], []).extend(found)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_words: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1/traces"


def test_one_trace_tells_of_a_request_over_both_hops(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    collector = Collector()
    traced = ["--otlp-endpoint", collector.endpoint]
    hospital, hospital_url = start("services.hospital", "--model", str(victim[0]), *traced)
    gateway, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url, *traced)
    httpx.post(f"{url}/predict", files={"file": encode_png(images(1)[0].numpy())}).raise_for_status()
    told = stop(gateway) + stop(hospital)
    assert not told, told
    collector.server.shutdown()
    collector.server.server_close()
    ids = {name: {span.trace_id for span in spans} for name, spans in collector.spans.items()}
    assert len(ids["zo-gateway-gateway"]) == 1
    assert ids["zo-gateway-hospital"] == ids["zo-gateway-gateway"]
    assert any("/predict" in span.name for span in collector.spans["zo-gateway-hospital"])
