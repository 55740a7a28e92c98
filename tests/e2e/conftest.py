import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from service_processes import CONFIG, Process, Start, publish

from defense.sanitizer import Sanitizer
from services.hospital.model import build_victim
from training.victim_fit import save_victim


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m <module> <arguments>` on a free port, gives the process and its URL, and ends it."""
    processes: list[Process] = []

    def run(module: str, *arguments: str) -> tuple[Process, str]:
        fixed = ["--port", "0", "--device", "cpu", "--threads", "1"]
        command = [sys.executable, "-W", "error", "-m", module, *fixed, *arguments]
        process = Process(command, tmp_path / f"errors-{len(processes)}")
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if "listening on" not in line:
            raise AssertionError(process.communicate()[1])
        return process, line.split()[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def victim(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    model = build_victim(CONFIG).eval()
    save_victim(tmp_path / "victim", model, CONFIG)
    return tmp_path / "victim", model


@pytest.fixture
def artifact(tmp_path: Path) -> tuple[Path, Sanitizer]:
    return tmp_path / "defense", publish(tmp_path / "defense", 1)
