"""Servers that other projects made, as processes of their own on free ports."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from arithmetic import SHAPE, SIDES, tensor

FOLDER = Path(__file__).parent / "servers"
MLSERVER = FOLDER.parents[2] / ".venv-mlserver" / "bin" / "mlserver"
_STARTING_S = 90


@contextmanager
def kserve(folder: Path) -> Iterator[str]:
    """KServe's Python server; its address."""
    if find_spec("kserve") is None:
        pytest.skip("KServe is not installed: the extra `dev` has it for Python before 3.14")
    (port,) = _free_ports(1)
    with _running([sys.executable, str(FOLDER / "kserve_server.py"), str(port)], port, folder) as url:
        yield url


@contextmanager
def mlserver(folder: Path) -> Iterator[str]:
    """MLServer; its address."""
    if not MLSERVER.exists():
        pytest.skip("MLServer is not installed: `make test-slow` makes its environment, with Python before 3.13")
    port, grpc_port = _free_ports(2)
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": grpc_port, "metrics_endpoint": None}
    (folder / "settings.json").write_text(json.dumps({**settings, "parallel_workers": 0}))
    scores = tensor("scores", "FP32", 3)
    images = tensor("x", "FP32", *SHAPE)
    models = {
        "classifier": {"inputs": [images], "outputs": [scores]},
        "segmenter": {"inputs": [images], "outputs": [tensor("polyp", "FP32", *SHAPE)]},
        "wordy": {"inputs": [images], "outputs": [tensor("word", "BYTES"), scores]},
        "sides": {"inputs": [tensor("x", "FP32", *SIDES)], "outputs": [tensor("scores", "FP32", 2)]},
        "undeclared": {},
    }
    for name, told in models.items():
        model = {"name": name, "implementation": "mlserver_models.Arithmetic", **told}
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(json.dumps(model))
    with _running([str(MLSERVER), "start", str(folder)], port, folder) as url:
        yield url


@contextmanager
def _running(command: Sequence[str], port: int, folder: Path) -> Iterator[str]:
    """Runs a server until the end of the context; its address once it is ready."""
    url = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=environment)
        try:
            until = time.monotonic() + _STARTING_S
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"{command} did not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/models/classifier/ready", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
