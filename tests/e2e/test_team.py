"""Several processes at one run, started by torchrun: the same result, the same ledger, and one of them killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from zo_fit_runs import WAIT_S, counting_hospital, step_of, wait_for

from defense.artifact import load_artifact
from services.hospital.model import VictimConfig, build_victim
from training.data.phantoms import BRAIN_LABELS
from training.fit.checkpoint import Journal
from training.victim.files import save_victim

START = Callable[..., subprocess.Popen[str]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SURROGATE = ["--guided", "--extra", "3", "--warm-up", "40", "--warm-up-steps", "5"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("method", [["--estimator", "rge"], SURROGATE], ids=["rge", "surrogate"])
def test_two_processes_learn_what_one_learns_and_spend_what_it_spends(start_zo_fit: START, tmp_path: Path, method):
    alone, together = tmp_path / "alone", tmp_path / "together"
    spent = []
    with counting_hospital() as (url, model):
        for out, processes in ((alone, 1), (together, 2)):
            before = model.images
            run = start_zo_fit(url, *method, "--steps", "6", "--out", str(out), processes=processes)
            errors = run.communicate(timeout=WAIT_S)[1]
            assert run.returncode == 0, errors
            spent.append(model.images - before)
    one, two = load_artifact(alone), load_artifact(together)
    assert spent[0] == spent[1] == Journal.total(together) == two.manifest.queries_spent
    assert one.manifest.queries == two.manifest.queries
    histories = [json.loads((out / "history.json").read_text()) for out in (alone, together)]
    for mine, theirs in zip(*histories, strict=True):
        assert mine["queries"] == theirs["queries"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
    for name, expected in one.sanitizer.state_dict().items():
        assert torch.allclose(two.sanitizer.state_dict()[name], expected, atol=2e-3), name
    assert not (together / "surrogate").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_of_two_of_which_one_is_killed_resumes(start_zo_fit: START, tmp_path: Path, victim: int):
    out = tmp_path / "out"
    with counting_hospital() as (url, model):
        run = start_zo_fit(url, "--steps", "100000", processes=2)
        wait_for(lambda: step_of(out) >= 3, "three steps")
        os.kill(children(run.pid)[victim], signal.SIGKILL)
        run.communicate(timeout=WAIT_S)
        assert run.returncode != 0
        killed_at = step_of(out)
        resumed = start_zo_fit(url, "--steps", str(killed_at + 3), "--resume", processes=2)
        errors = resumed.communicate(timeout=WAIT_S)[1]
        assert resumed.returncode == 0, errors
        received = model.images
    assert f"resumed after step {killed_at}" in errors
    manifest = load_artifact(out).manifest
    assert received <= manifest.queries_spent <= received + 4 * (1 + 4)
    assert manifest.queries_spent == Journal.total(out)


def test_a_victim_that_stays_away_ends_all_of_them_with_one_message(start_zo_fit: START, tmp_path: Path):
    with counting_hospital() as (url, _):
        run = start_zo_fit(url, "--steps", "100000", "--patience", "1", processes=2)
        wait_for(lambda: step_of(tmp_path / "out") >= 2, "two steps")
    errors = run.communicate(timeout=WAIT_S)[1]
    assert run.returncode != 0
    assert "continue from the last checkpoint with --resume" in errors
    assert step_of(tmp_path / "out") >= 2


def run(*arguments: str) -> None:
    ended = subprocess.run([*arguments], capture_output=True, text=True, timeout=2 * WAIT_S, check=False)
    assert ended.returncode == 0, ended.stderr


def test_certificates_and_attacks_of_two_processes_are_those_of_one(tmp_path: Path):
    torch.manual_seed(0)
    config = VictimConfig(labels=BRAIN_LABELS, size=(32, 32), width=0.125)
    save_victim(tmp_path / "victim", build_victim(config), config)
    size, weights = ["--data", "phantom", "--size", "32", "--limit", "7"], str(tmp_path / "victim")
    with counting_hospital() as (url, _):
        certify = ["-m", "training.certify", "--url", url, "--name", "bare", *size, "--n0", "5", "--samples", "20"]
        evaluate = ["-m", "training.evaluate", "--victim", weights, *size, "--attacks", "fgsm,ddn"]
        evaluate += ["--epsilons-linf", "4"]
        for name, start in (("one", [sys.executable]), ("two", TORCHRUN)):
            results = ["--results", str(tmp_path / f"{name}.json")]
            run(*start, *certify, *results, "--out", str(tmp_path / f"{name}.jsonl"))
            run(*start, *evaluate, *results)
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("one", "two")]
    certificates = [[{**json.loads(line), "seconds": 0} for line in part] for part in lines]
    assert certificates[0] == certificates[1]
    assert len(certificates[0]) == 1 + 7
    rows = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    for mine, theirs in zip(*(one["rows"] if isinstance(one, dict) else one for one in rows), strict=True):
        assert {**mine, "value": 0, "low": 0, "high": 0} == {**theirs, "value": 0, "low": 0, "high": 0}
        assert mine["value"] == pytest.approx(theirs["value"], rel=1e-3, abs=1e-3)
