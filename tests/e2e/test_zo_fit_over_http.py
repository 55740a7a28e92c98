"""zo_fit against a real hospital process: killed and resumed, and with the hospital gone for a while."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from defense.artifact import load_artifact
from services.hospital.model import VictimConfig, build_victim, save_victim
from training import pretrain
from training.checkpoint import Checkpoint, Journal
from training.phantoms import BRAIN_LABELS

SIZE = "32"
WAIT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"timed out waiting for {what}")


class Hospital:
    """A hospital process on a port of its own, that can be killed and started again."""

    def __init__(self, model: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "services.hospital", "--model", str(model), "--threads", "1"]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([*self._command, "--port", str(self.port)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert "listening" in self._process.stdout.readline()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    arguments = ["--size", SIZE, "--pretrain-steps", "2", "--code", "32", "--out", str(folder)]
    assert pretrain.main(arguments) == 0
    return folder


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    torch.manual_seed(0)
    config = VictimConfig(labels=BRAIN_LABELS, size=(32, 32), width=0.125)
    save_victim(tmp_path / "victim", build_victim(config), config)
    running = Hospital(tmp_path / "victim")
    yield running
    running.kill()


@pytest.fixture
def zo_fit(hospital: Hospital, pretrained: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*more: str) -> subprocess.Popen[str]:
        arguments = ["--victim-url", hospital.url, "--pretrained", str(pretrained), "--size", SIZE]
        quick = ["--batch", "4", "--directions", "4", "--validation-images", "8", "--checkpoint-every", "1"]
        command = [sys.executable, "-m", "training.zo_fit", *arguments, *quick, "--out", str(tmp_path / "out"), *more]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def step_of(out: Path) -> int:
    if not (out / "checkpoint.safetensors").exists():
        return -1
    step: int = Checkpoint.load(out).state["step"]
    return step


def test_a_killed_run_resumes_with_its_ledger_intact(zo_fit, tmp_path):
    out = tmp_path / "out"
    first = zo_fit("--steps", "100000")
    wait_for(lambda: step_of(out) >= 5, "five steps")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    killed_at, sent = step_of(out), Journal.total(out)
    assert not (out / "manifest.json").exists()

    resumed = zo_fit("--steps", str(killed_at + 3), "--resume")
    errors = resumed.communicate(timeout=WAIT_S)[1]
    assert resumed.returncode == 0, errors
    assert f"resumed after step {killed_at}" in errors
    queries = load_artifact(out).manifest.queries
    assert sum(queries.values()) == Journal.total(out) > sent
    assert [entry["step"] for entry in json.loads((out / "history.json").read_text())][-1] == killed_at + 3


def test_a_hospital_that_restarts_is_waited_for(zo_fit, hospital, tmp_path):
    out = tmp_path / "out"
    run = zo_fit("--max-queries", "4000")
    wait_for(lambda: step_of(out) >= 3, "three steps")
    hospital.kill()
    before = step_of(out)
    time.sleep(1)
    assert run.poll() is None
    assert step_of(out) - before <= 1  # what was answered before the end
    hospital.start()
    errors = run.communicate(timeout=WAIT_S)[1]
    assert run.returncode == 0, errors
    manifest = load_artifact(out).manifest
    assert manifest.queries_spent == Journal.total(out) <= 4000
    assert step_of(out) > before + 10


def test_a_hospital_that_stays_away_ends_the_run_with_a_message_and_a_checkpoint(zo_fit, hospital, tmp_path):
    out = tmp_path / "out"
    run = zo_fit("--patience", "1")
    wait_for(lambda: step_of(out) >= 2, "two steps")
    hospital.kill()
    errors = run.communicate(timeout=WAIT_S)[1]
    hospital.start()  # for the fixture to end it
    assert run.returncode == 2
    assert "continue from the last checkpoint with --resume" in errors
    assert "cannot be reached" in errors
    assert "Traceback" not in errors
    assert step_of(out) >= 2
