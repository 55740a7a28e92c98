"""Every benchmark once, on as little as it takes: that it runs to its table, not what it measures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.query_attacks import labelled_otherwise
from training.command.errors import UserError

ROOT = Path(__file__).parents[2]
SIZE = ("--data", "phantom", "--size", "32")
STARTED_BY_OTHERS = {"paced", "peers"}

BENCHMARKS = {
    "certified_attacks": "--victim VICTIM --artifact ARTIFACT DATA --images 1 --n 50 --copies 1 --steps 2",
    "decoding": "--rounds 1",
    "estimator_error": "--victim VICTIM --pretrained PRETRAINED DATA --images 4 --students 8 --out OUT",
    "gateway_modes": "--victim VICTIM --artifact ARTIFACT --rounds 1 --smooth-n 12 --certify-n 16",
    "latency": "--victim VICTIM --artifact ARTIFACT --rounds 2",
    "load": "--victim VICTIM --artifact ARTIFACT --seconds 1 --batch 2",
    "local_credit": "--victim SEGMENTER --pretrained SEGMENTERS DATA --task segmentation --images 2 --out OUT",
    "precision": "--model VICTIM --artifact ARTIFACT DATA --slopes 4 --probes 1 --votes 2",
    "query_attacks": "--victim VICTIM --artifact ARTIFACT DATA --images 6 --queries 4",
    "runtimes": "--artifact ARTIFACT --batches 1 2 --rounds 1",
    "scaling": "--victim VICTIM --pretrained PRETRAINED --processes 2 --victims 1 --steps 1 3 --flags SCALING",
    "theory_figures": "--out OUT",
    "throughput": "--victim VICTIM --artifact ARTIFACT --clients 1 2 --seconds 1 --repeats 1",
    "zo_throughput": "--model VICTIM --artifact ARTIFACT --directions 2 --batch 4 --rounds 1",
}


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Victims and sanitizers of both tasks, hardly trained."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for task, victim, pretrained in (
        ("classification", "victim", "pretrained"),
        ("segmentation", "segmenter", "segmenters"),
    ):
        run("training.victim_fit", *SIZE, "--task", task, "--epochs", "1", "--out", str(folder / victim))
        few = ["--pretrain-steps", "2", "--code", "256"]
        run("training.pretrain", *SIZE, "--task", task, *few, "--out", str(folder / pretrained))
    return folder


def test_every_benchmark_is_here() -> None:
    modules = (ROOT / "benchmarks").glob("*.py")
    programs = {path.stem for path in modules if "__main__" in path.read_text()} - STARTED_BY_OTHERS
    assert programs == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs_to_its_end(name: str, folder: Path, tmp_path: Path) -> None:
    places = {
        "VICTIM": [str(folder / "victim")],
        "ARTIFACT": [str(folder / "pretrained" / "denoiser")],
        "PRETRAINED": [str(folder / "pretrained")],
        "SEGMENTER": [str(folder / "segmenter")],
        "SEGMENTERS": [str(folder / "segmenters")],
        "DATA": SIZE,
        "OUT": [str(tmp_path / "out")],
        "SCALING": ["--sanitizer denoiser --batch 4 --directions 2 --size 32"],
    }
    arguments = [word for one in BENCHMARKS[name].split() for word in places.get(one, [one])]
    assert run(f"benchmarks.{name}", *arguments)


def test_hop_skip_jump_starts_from_an_image_of_another_label() -> None:
    labels = torch.tensor([0, 0, 1, 0])
    assert labelled_otherwise(labels, 0, chosen=3) == 2
    assert labelled_otherwise(labels, 2, chosen=3) == 0
    assert labelled_otherwise(labels, 1, chosen=2) == 2  # the chosen ones have one class
    with pytest.raises(UserError, match="same label"):
        labelled_otherwise(labels[:2], 0, chosen=1)
