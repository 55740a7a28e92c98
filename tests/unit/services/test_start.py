"""What a service does before it is asked anything: it says a line at once, and imports nothing that it does not use."""

import subprocess
import sys

import pytest

HEAVY = ("scipy", "torchvision", "torch._dynamo", "sympy", "onnxruntime", "openvino", "ray", "pydicom")
"""For certified answers, VGG victims, compilers, Ray Serve and DICOM only."""


def test_the_gateway_imports_nothing_that_it_does_not_use() -> None:
    code = (
        "import sys\n"
        "from services.gateway.__main__ import main\n"
        "assert 'torch' not in sys.modules, 'something is to be said before that'\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "import services.gateway.app\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--victim-url" in ended.stdout
    assert ended.stderr.strip() == ""


@pytest.mark.parametrize("service", ["gateway", "hospital"])
def test_a_service_says_at_once_that_it_is_loading(service: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"services.{service}", "--help"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            if line == f"{service}: loading ...\n":
                break
            before.append(line)
        process.kill()
    assert 0 < len(before) < 200, "modules of Python itself"
    assert not any("torch" in line or "fastapi" in line for line in before)
