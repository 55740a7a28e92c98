"""The gateway on a local Ray: two replicas answer as one gateway does, and scale with the requests in flight."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import torch
from service_processes import CONFIG
from zo_fit_runs import WAIT_S, free_port, serving_hospital

from services.protocol import oip


def test_replicas_answer_as_one_gateway_does(artifact, victim, tmp_path: Path) -> None:
    folder, sanitizer = artifact
    images = np.random.default_rng(0).random((3, CONFIG.channels, *CONFIG.size), dtype=np.float32)
    body, headers = oip.encode_request([oip.Tensor(oip.INPUT, images)])
    port = free_port()
    with serving_hospital(victim[1], CONFIG) as url, (tmp_path / "errors").open("w+") as errors:
        command = [sys.executable, "-m", "services.gateway.on_ray", "--artifact", str(folder), "--victim-url", url]
        scaling = ["--max-replicas", "2", "--target-requests", "1", "--upscale-delay-s", "0", "--cpus", "0.1"]
        command += [*scaling, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            while "gateway listening on" not in (line := process.stdout.readline()):
                assert line, Path(errors.name).read_text()
            gateway = f"http://127.0.0.1:{port}"

            def ask(_: int = 0) -> np.ndarray:
                answer = httpx.post(f"{gateway}/predict", content=body, headers=headers, timeout=60).raise_for_status()
                outputs = oip.decode_response(answer.content, oip.header_length(answer.headers.get(oip.HEADER)))
                return outputs["probabilities"]

            with torch.inference_mode():
                expected = victim[1](sanitizer(torch.from_numpy(images))).softmax(1).numpy()
            assert np.allclose(ask(), expected, atol=1e-4)
            assert httpx.get(f"{gateway}/v2/models/defended").json()["parameters"]["modes"] == "sanitize"
            assert httpx.post(f"{gateway}/predict", content=b"?").status_code == 400
            deadline = time.monotonic() + WAIT_S
            with ThreadPoolExecutor(8) as pool:
                while replicas(process.pid) < 2:
                    assert time.monotonic() < deadline, "no second replica was started"
                    for scores in pool.map(ask, range(32)):
                        assert np.allclose(scores, expected, atol=1e-4)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, (tmp_path / "errors").read_text()


def replicas(driver: int) -> int:
    """Processes of this machine that are replicas of the gateway, started since the driver was."""
    since = started(driver)
    names = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if started(int(place.name)) >= since:
                names[place.name] = (place / "cmdline").read_bytes().partition(b"\0")[0]
        except OSError:  # it ended meanwhile
            continue
    return sum(name.startswith(b"ray::ServeReplica:gateway") for name in names.values())


def started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
