"""The API reference builds from the docstrings without a warning, and holds every module."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("defense", "services", "training")


@pytest.mark.slow
def test_the_reference_builds_without_warnings_and_holds_every_module(tmp_path: Path) -> None:
    make = (ROOT / "Makefile").read_text()
    (line,) = [line for line in make.splitlines() if "-m pdoc" in line]
    command = line.strip().replace("$(BIN)/python", sys.executable).replace("$(OUT)", str(tmp_path)).split()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            hidden = "__all__" in (path.parent / "__init__.py").read_text()  # what it names stands on its own page
            if hidden or path.stem.startswith("_"):  # a package's page is named after it
                continue
            page = tmp_path / "reference" / path.relative_to(ROOT).with_suffix(".html")
            assert page.exists(), page
