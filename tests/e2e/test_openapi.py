"""Schemathesis asks both services what their OpenAPI documents allow, and what they do not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from service_processes import Start, stop

from defense.sanitizer import Sanitizer

CHECKS = "status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"


@pytest.mark.parametrize("which", ["hospital", "gateway"])
def test_what_the_document_says_is_what_is_answered(
    which: str, start: Start, victim: tuple[Path, torch.nn.Module], artifact: tuple[Path, Sanitizer], tmp_path: Path
) -> None:
    process, url = start("services.hospital", "--model", str(victim[0]), "--docs")
    if which == "gateway":
        flags = ["--docs", "--usage", "--modes", "sanitize,smooth", "--smooth-n", "16", "--detection", "off"]
        process, url = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", url, *flags)
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", CHECKS]
    bounds = ["--max-examples", "25", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    run = subprocess.run([*command, *bounds], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " ERROR " not in stop(process), "nothing unexpected happened inside"
