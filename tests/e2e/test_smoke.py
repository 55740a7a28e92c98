"""The processes that `make test` starts: both services, and a run of zo_fit that is killed and resumed."""

import json
import signal
from pathlib import Path

import httpx
import pytest
import torch
from service_processes import Start, images, stop
from zo_fit_runs import WAIT_S, counting_hospital, step_of, wait_for

from defense.artifact import load_artifact
from defense.sanitizer import Sanitizer
from services.protocol.client import HTTPVictim
from services.protocol.images import encode_png
from training.fit.checkpoint import Journal


def test_hospital_and_gateway_answer_images_and_tensors_and_end_quietly(
    start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer]
) -> None:
    hospital, hospital_url = start("services.hospital", "--model", str(victim[0]))
    gateway, gateway_url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", hospital_url)
    batch = images(300)
    with torch.inference_mode():
        bare, defended = victim[1](batch).softmax(1), victim[1](artifact[1](batch)).softmax(1)
    for url, expected in ((hospital_url, bare), (gateway_url, defended)):
        with HTTPVictim([url], batch=128) as client:
            assert client.ready()
            assert torch.allclose(client(batch), expected, atol=1e-5)
            told = client.describe(batch[0])
            assert told["labels"] == ["a", "b", "c"]
            assert told["probabilities"] == pytest.approx(expected[0].tolist(), abs=0.01)
        files = {"file": ("scan.png", encode_png(batch[0].numpy()), "image/png")}
        response = httpx.post(f"{url}/predict", files=files)
        assert response.json() == told
    assert response.headers["X-Artifact-Id"] == response.json()["artifact"]["id"]
    assert response.json()["artifact"]["queries_spent"] == 7
    assert stop(gateway) == ""
    assert stop(hospital) == ""


def test_a_killed_run_resumes_and_its_ledger_is_what_the_victim_received(start_zo_fit, tmp_path):
    out = tmp_path / "out"
    with counting_hospital() as (url, model):
        first = start_zo_fit(url, "--steps", "100000")
        wait_for(lambda: step_of(out) >= 5, "five steps")
        first.send_signal(signal.SIGKILL)
        first.communicate()
        killed_at, sent = step_of(out), Journal.total(out)
        assert not (out / "manifest.json").exists()

        resumed = start_zo_fit(url, "--steps", str(killed_at + 3), "--resume")
        errors = resumed.communicate(timeout=WAIT_S)[1]
        assert resumed.returncode == 0, errors
        received = model.images
    assert f"resumed after step {killed_at}" in errors
    assert [entry["step"] for entry in json.loads((out / "history.json").read_text())][-1] == killed_at + 3
    manifest = load_artifact(out).manifest
    # Queries are booked before they leave: only the request in hand when the process was killed, one step's at most,
    # may be booked and not received.
    assert received <= manifest.queries_spent <= received + 4 * (1 + 4)
    assert manifest.queries_spent == Journal.total(out) > sent
