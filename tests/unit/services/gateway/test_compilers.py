"""What computes the sanitizer, and that it is held to PyTorch's answers."""

import subprocess
import sys

import pytest
import torch
from gateway_fakes import Inverts
from torch import Tensor, nn

from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from services.gateway import compilers
from services.gateway.compilers import TOLERANCE, Kind, Runtime, load_runtime
from services.protocol.errors import ServiceError

SHAPE = (3, 32, 32)
CPU = torch.device("cpu")


def sanitizer() -> Sanitizer:
    torch.manual_seed(0)
    shape = ImageShape(channels=3, height=32, width=32)
    config = SanitizerConfig(input=shape, components=8, autoencoder="linear", code=16)
    return Sanitizer(config).eval()


class Branches(nn.Module):
    """No network that can be exported: what it does depends on what it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clamp(0, 1) if float(images.mean()) > 0.5 else (1 - images).clamp(0, 1)


@pytest.mark.parametrize("kind", ["torch", "onnxruntime", "openvino"])
def test_every_runtime_answers_as_torch_does_at_every_batch_size(kind: Kind) -> None:
    module = sanitizer()
    runtime = load_runtime(kind, module, SHAPE, CPU)
    assert runtime.kind == kind
    with torch.inference_mode():
        for count in (1, 7, 3, 64):
            images = torch.rand(count, *SHAPE)
            kept = images.clone()
            answer = runtime.run(images)
            assert answer.shape == images.shape
            assert answer.dtype == torch.float32
            assert torch.equal(images, kept)
            assert float((answer - module(images)).abs().max()) < TOLERANCE / 10
            before = answer.clone()
            runtime.run(torch.rand(count, *SHAPE))
            assert torch.equal(answer, before)  # not where the next answer is written


def test_auto_takes_the_fastest_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    costs = {"torch": 1.0, "openvino": 0.5, "onnxruntime": 0.25}
    apart = {"torch": 0.0, "openvino": TOLERANCE / 2, "onnxruntime": TOLERANCE * 2}

    def fake(kind: Kind, *_: object) -> Runtime:
        opened.append(kind)
        return Runtime(kind, Inverts())

    monkeypatch.setattr(compilers, "is_installed", lambda kind: True)
    monkeypatch.setattr(compilers, "open_runtime", fake)
    monkeypatch.setattr(compilers, "disagreement", lambda runtime, *_: apart[runtime.kind])
    monkeypatch.setattr(compilers, "_cost", lambda runtime, _: costs[runtime.kind])
    assert load_runtime("auto", Inverts(), SHAPE, CPU).kind == "openvino"
    assert opened == ["torch", "openvino", "onnxruntime"]
    costs["openvino"] = 0.99  # hardly faster
    assert load_runtime("auto", Inverts(), SHAPE, CPU).kind == "torch"
    apart["onnxruntime"] = 0.0
    assert load_runtime("auto", Inverts(), SHAPE, CPU).kind == "onnxruntime"
    monkeypatch.setattr(compilers, "is_installed", lambda kind: kind == "torch")
    assert load_runtime("auto", Inverts(), SHAPE, CPU).kind == "torch"


def test_what_cannot_be_exported_rightly_runs_on_torch() -> None:
    runtime = load_runtime("auto", Branches(), (1, 8, 8), CPU)
    dark, bright = torch.full((1, 1, 8, 8), 0.1), torch.full((1, 1, 8, 8), 0.9)
    for images in (dark, bright):
        assert torch.allclose(runtime.run(images), torch.full_like(images, 0.9))


def test_a_runtime_that_was_asked_for_and_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "disagreement", lambda *_: 2 / 255)
    with pytest.raises(ServiceError, match=r"--runtime openvino differs from torch by 2\.00/255, more than 0\.5/255"):
        load_runtime("openvino", sanitizer(), SHAPE, CPU)


def test_one_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match=r"--runtime openvino needs openvino: pip install 'zo-gateway\[runtimes\]'"):
        load_runtime("openvino", sanitizer(), SHAPE, CPU)


def test_one_that_does_not_run_on_the_device_says_so() -> None:
    with pytest.raises(ServiceError, match="--runtime onnxruntime runs on the CPU, not on meta"):
        load_runtime("onnxruntime", sanitizer(), SHAPE, torch.device("meta"))


def test_nothing_is_reported_to_the_makers_of_a_runtime() -> None:
    code = (
        "import sys, torch\n"
        "from services.gateway.compilers import load_runtime\n"
        "load_runtime('openvino', torch.nn.Sigmoid(), (1, 8, 8), torch.device('cpu'))\n"
        "assert 'openvino' in sys.modules\n"
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules), 'telemetry'\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
