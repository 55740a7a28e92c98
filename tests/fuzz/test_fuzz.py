"""Every fuzz target for a short while; `make fuzz` runs them for long."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has no wheel for this Python or system")

TARGETS = Path(__file__).with_name("targets.py")
RUNS = 3000


@pytest.mark.parametrize("target", ["oip", "image", "dicom", "inflate", "artifact"])
def test_a_short_run_finds_nothing(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TARGETS), target, str(tmp_path / "corpus"), f"-runs={RUNS}", "-max_total_time=60"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-6000:]
    assert not list(tmp_path.glob("crash-*")) + list(tmp_path.glob("timeout-*")) + list(tmp_path.glob("oom-*"))
