import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from service_processes import CONFIG, Process, Start, publish
from zo_fit_runs import SIZE

from defense.sanitizer import Sanitizer
from services.hospital.model import build_victim
from training import pretrain
from training.victim.files import save_victim


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


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    arguments = ["--size", SIZE, "--pretrain-steps", "2", "--code", "32", "--out", str(folder)]
    assert pretrain.main(arguments) == 0
    return folder


@pytest.fixture
def start_zo_fit(pretrained: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *more: str, processes: int = 1) -> subprocess.Popen[str]:
        arguments = ["--victim-url", url, "--pretrained", str(pretrained), "--size", SIZE]
        quick = ["--batch", "4", "--directions", "4", "--validation-images", "8", "--checkpoint-every", "1"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "training.zo_fit"]
        command += [*arguments, *quick, "--out", str(tmp_path / "out"), *more]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
