"""zo_fit against a real hospital process: killed and resumed, and with the hospital gone for a while."""

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from zo_fit_runs import WAIT_S, counting_hospital, free_port, step_of, wait_for

from defense.artifact import load_artifact
from services.hospital.model import VictimConfig, build_victim
from training.data.phantoms import BRAIN_LABELS
from training.fit.checkpoint import Journal
from training.victim.files import save_victim

KILLS = 3 * int(os.environ.get("CHAOS_ROUNDS", "1"))


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


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    torch.manual_seed(0)
    config = VictimConfig(labels=BRAIN_LABELS, size=(32, 32), width=0.125)
    save_victim(tmp_path / "victim", build_victim(config), config)
    running = Hospital(tmp_path / "victim")
    yield running
    running.kill()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def zo_fit(hospital: Hospital, start_zo_fit: Start) -> Start:
    return partial(start_zo_fit, hospital.url)


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


def test_a_run_killed_at_random_ends_where_the_unbroken_run_ends(start_zo_fit, tmp_path):
    unbroken, broken, steps = tmp_path / "unbroken", tmp_path / "broken", ["--steps", "10"]
    with counting_hospital() as (url, model):
        run = start_zo_fit(url, *steps, "--out", str(unbroken))
        errors = run.communicate(timeout=WAIT_S)[1]
        assert run.returncode == 0, errors
        assert model.images == Journal.total(unbroken)
        model.images, kills = 0, 0
        while not (broken / "manifest.json").exists():
            resume = ["--resume"] if step_of(broken) >= 0 else []
            before, is_last = step_of(broken), kills >= KILLS
            run = start_zo_fit(url, *steps, "--out", str(broken), *resume)
            if not is_last:
                wait_for(lambda was=before, now=run: step_of(broken) > was or now.poll() is not None, "a step")
                time.sleep(random.uniform(0, 0.3))
                run.kill()
                kills += 1
            errors = run.communicate(timeout=WAIT_S)[1]
            assert not is_last or run.returncode == 0, errors
        received = model.images
    one, other = load_artifact(unbroken), load_artifact(broken)
    for name, expected in one.sanitizer.state_dict().items():
        assert torch.equal(other.sanitizer.state_dict()[name], expected), name
    whole, pieces = one.manifest.queries, dict(other.manifest.queries)
    pieces.pop("lost", None)
    # Every start asks the victim one question about itself; nothing else of the work that counts is done twice.
    assert whole["probe"] <= pieces.pop("probe") <= whole["probe"] + kills
    assert pieces == {purpose: count for purpose, count in whole.items() if purpose != "probe"}
    assert other.manifest.queries_spent == Journal.total(broken)
    assert received <= Journal.total(broken) <= received + kills * 4 * (1 + 4)


def test_a_full_disk_loses_neither_checkpoint_nor_ledger(start_zo_fit, tmp_path):
    out = tmp_path / "out"
    with counting_hospital() as (url, model):
        run = start_zo_fit(url, "--steps", "100000")
        wait_for(lambda: step_of(out) >= 3, "three steps")
        size = (out / "checkpoint.safetensors").stat().st_size
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))  # what it writes ends with an error
        errors = run.communicate(timeout=WAIT_S)[1]
        assert run.returncode == 2
        assert "File too large" in errors
        assert "Traceback" not in errors
        stopped_at = step_of(out)
        assert stopped_at >= 3
        assert not list(out.glob(".*.saving")), "nothing half-written stays"
        run = start_zo_fit(url, "--steps", str(stopped_at + 2), "--resume")
        errors = run.communicate(timeout=WAIT_S)[1]
        assert run.returncode == 0, errors
        assert model.images == load_artifact(out).manifest.queries_spent == Journal.total(out)
