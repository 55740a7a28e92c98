"""Every command of the README is typed as it stands there, in its order, on small images and budgets."""

import os
import re
import shlex
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from PIL import Image
from zo_fit_runs import free_port, wait_for

from training.data.phantoms import BRAIN_LABELS, brain_phantoms

ROOT = Path(__file__).parents[2]

MAKE = re.compile(r"make ")
"""Not run here, but by `make --dry-run`: test_demo.py runs the demo, and this is one of the tests."""

CONTAINERS = re.compile(r"docker compose|curl .*localhost:8080")
"""Run by deploy/compose-check.sh where there is a container engine."""

SMALLER = {
    "--max-queries 100000": "--max-queries 900 --batch 4 --extra 4 --warm-up 40 --warm-up-steps 4 "
    "--validation-images 8 --pretrain-steps 2 --code 32",
    "training.pretrain": "training.pretrain --pretrain-steps 2 --code 32",
    "--budgets 25000,100000 --seeds 0,1,2": "--budgets 2500 --seeds 0 --n 100 --limit 4",
    ",guided,surrogate ": " ",  # their first training alone takes longer than all the rest
    "--limit 40": "--limit 4",
    "training.certify": "training.certify --n 100",
    "training.redteam": "training.redteam --queries 20 --student-queries 20 --student-steps 2",
}
"""What is typed, and what is run: the same programs on less."""


def commands() -> list[str]:
    """What the README's blocks tell to type, line by line, continued lines joined, without comments."""
    found = []
    for block in re.findall(r"^ *```\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        lines = [re.sub(r"\s+#.*", "", line).strip() for line in block.replace("\\\n", " ").splitlines()]
        found += [
            re.sub(r"\s+", " ", line) for line in lines if re.match(r"(make|python|curl|docker|\w+=\w+ )\b", line)
        ]
    return found


class Shell:
    """One who follows the README: a folder, services in terminals of their own, and what was shown once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {"8000": str(free_port()), "8080": str(free_port())}
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self.key = ""
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment |= {"PYTHONPATH": str(ROOT), "CURL_CA_BUNDLE": str(folder / "authority.pem")}

    def type(self, command: str) -> str:
        """Runs it; of a service, until it is ready. What it printed."""
        for written, real in {
            **SMALLER,
            **self.ports,
            "HOST": "127.0.0.1",
            "X-API-Key: KEY": f"X-API-Key: {self.key}",
        }.items():
            command = command.replace(written, real)
        if re.match(r"python -m services\.(hospital|gateway)", command):
            return self._serve(command)
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if "services.keys" in command:
            self.key = done.stderr.split()[-1]
        return done.stdout

    def _serve(self, command: str) -> str:
        port = command.split("--port ")[1].split()[0]
        self.end(port)
        log = self.folder / f"{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                shlex.split(command), cwd=self.folder, env=self.environment, stdout=file, stderr=file
            )
        self.services[port] = process
        scheme = "https" if "--tls-cert" in command else "http"
        trusted = ssl.create_default_context(cafile=str(self.folder / "authority.pem"))

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(f"{scheme}://127.0.0.1:{port}/v2/health/ready", verify=trusted).status_code == 200
            except httpx.HTTPError:
                time.sleep(0.2)
                return False

        wait_for(ready, command)
        return ""

    def end(self, port: str) -> None:
        if port in self.services:
            process = self.services.pop(port)
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Where `make demo` was, at a tiny size, and a folder of images."""
    folder = tmp_path_factory.mktemp("readme")
    shell = Shell(folder)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    shell.type("python -m training.demo --out artifacts --epochs 1 --pretrain-steps 4 --max-queries 2000 --limit 8")
    (folder / "scan.png").write_bytes((folder / "artifacts/phantom/victim/example.png").read_bytes())
    images, labels = brain_phantoms(80, seed=1)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / "path/to/images" / BRAIN_LABELS[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(place / f"{number}.png")
    yield shell
    for port in list(shell.services):
        shell.end(port)


def test_every_command_of_the_readme_does_what_it_says(shell: Shell) -> None:
    typed = commands()
    assert len(typed) > 12
    for command in typed:
        if CONTAINERS.search(command):
            continue
        if MAKE.match(command):
            subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            continue
        printed = shell.type(command)
        if command.startswith("curl") and "/predict" in command:
            assert '"label"' in printed, command
    assert (shell.folder / "artifacts/defense/report.html").exists()
