"""Runs the sanitizer with PyTorch or a compiled runtime.

A compiled runtime is used only if it agrees with PyTorch in float32 within `TOLERANCE` on probe images, so that what
was measured with one holds for the other.
"""

import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from services.protocol.errors import ServiceError

logger = logging.getLogger(__name__)

Kind = Literal["torch", "onnxruntime", "openvino"]
RuntimeName = Literal["auto", Kind]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

TOLERANCE: Final = 0.5 / 255
"""Most that a pixel in [0,1] may differ from PyTorch's: what rounding to 8 bits does."""

_AUTO: Final[tuple[Kind, ...]] = ("openvino", "onnxruntime")
"""What is tried beside PyTorch."""

_NEEDS: Final[Mapping[Kind, tuple[str, ...]]] = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
_BATCHES: Final = (1, 32)
_ROUNDS: Final = 5
_MARGIN: Final = 0.95
"""Of PyTorch's time, what another runtime may take at most to be preferred to it."""

Run = Callable[[Tensor], Tensor]
"""Images to images; a module is one too."""


@dataclass(frozen=True)
class Runtime:
    """What computes the sanitizer: `run` maps (n,C,H,W) float32 CPU images to the same, in one thread at a time."""

    kind: Kind
    run: Run


def load_runtime(name: RuntimeName, sanitizer: nn.Module, shape: tuple[int, int, int], device: torch.device) -> Runtime:
    """Makes a sanitizer ready to run.

    Args:
        name: the runtime; "auto": on a CPU the fastest installed one that agrees with PyTorch, elsewhere PyTorch.
        sanitizer: the module; it is moved to the device.
        shape: (C,H,W) of its images.
        device: where it runs; only "torch" runs elsewhere than on the CPU.

    Raises:
        ServiceError: the named runtime is not installed, cannot run this network here, or disagrees with PyTorch.
    """
    if name != "auto":
        runtime = open_runtime(name, sanitizer, shape, device)
        if name != "torch" and (apart := disagreement(runtime, sanitizer, shape, device)) > TOLERANCE:
            raise ServiceError(
                f"--runtime {name} differs from torch by {apart * 255:.2f}/255, more than {TOLERANCE * 255:g}/255"
            )
        return runtime
    torch_itself = open_runtime("torch", sanitizer, shape, device)
    if device.type != "cpu":
        return torch_itself
    best, least = torch_itself, _cost(torch_itself, shape) * _MARGIN
    for kind in _AUTO:
        if not is_installed(kind):
            continue
        try:
            other = open_runtime(kind, sanitizer, shape, device)
            agrees = disagreement(other, sanitizer, shape, device) <= TOLERANCE
        except ServiceError as error:
            logger.info("runtime %s is left out: %s", kind, error)
            continue
        if agrees and (cost := _cost(other, shape)) < least:
            best, least = other, cost
    logger.info("the sanitizer runs on %s", best.kind)
    return best


def is_installed(kind: Kind) -> bool:
    """Whether the packages that a runtime needs are installed."""
    return all(find_spec(package) is not None for package in _NEEDS.get(kind, ()))


def open_runtime(kind: Kind, sanitizer: nn.Module, shape: tuple[int, int, int], device: torch.device) -> Runtime:
    """Opens one runtime without comparing it. Raises ServiceError if it is not installed or cannot run the network."""
    if not is_installed(kind):
        raise ServiceError(f"--runtime {kind} needs {', '.join(_NEEDS[kind])}: pip install 'zo-gateway[runtimes]'")
    if device.type != "cpu" and kind != "torch":
        raise ServiceError(f"--runtime {kind} runs on the CPU, not on {device}")
    sanitizer.to(device).to(memory_format=torch.channels_last).eval()
    try:
        with torch.inference_mode(), _quiet():
            run = _OPEN[kind](sanitizer, shape, device)
    except Exception as error:  # whatever a compiler of networks raises about one that it does not know
        told = str(error).strip().partition("\n")[0]
        raise ServiceError(f"--runtime {kind} cannot run this sanitizer: {type(error).__name__}: {told}") from error
    return Runtime(kind, run)


def disagreement(runtime: Runtime, sanitizer: nn.Module, shape: tuple[int, int, int], device: torch.device) -> float:
    """The largest difference of a pixel of the probe images from PyTorch in float32."""
    images = _probe(8, shape)
    with torch.inference_mode():
        return float((runtime.run(images) - _torch(sanitizer, shape, device)(images)).abs().max())


def _cost(runtime: Runtime, shape: tuple[int, int, int]) -> float:
    """Seconds per image, summed over the batch sizes; the minimum of several rounds."""
    total = 0.0
    with torch.inference_mode():
        for size in _BATCHES:
            images, taken = _probe(size, shape), []
            for _ in range(_ROUNDS + 1):
                begun = time.perf_counter()
                runtime.run(images)
                taken.append(time.perf_counter() - begun)
            total += min(taken[1:]) / size
    return total


def _probe(images: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise on uniform grey, from dark to bright."""
    noise = torch.rand((images, *shape), generator=torch.Generator().manual_seed(0))
    return 0.4 * noise + 0.6 * torch.linspace(0, 1, images).view(-1, 1, 1, 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _torch(sanitizer: Run, _shape: tuple[int, int, int], device: torch.device) -> Run:
    def run(images: Tensor) -> Tensor:
        sanitized: Tensor = sanitizer(images.to(device, memory_format=torch.channels_last))
        return sanitized.float().cpu().contiguous()

    return run


def _onnxruntime(sanitizer: nn.Module, shape: tuple[int, int, int], _device: torch.device) -> Run:
    import onnxruntime

    exported = torch.onnx.export(
        copy.deepcopy(sanitizer),
        (_probe(2, shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        verbose=False,
    )
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {entry.name: images.numpy()})[0])


def _openvino(sanitizer: nn.Module, shape: tuple[int, int, int], _device: torch.device) -> Run:
    # Without this, to import OpenVINO is to report it to its makers, over the network; with it, it uses its own stub.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    model = openvino.convert_model(
        copy.deepcopy(sanitizer), example_input=_probe(2, shape), input=[openvino.PartialShape([-1, *shape])]
    )
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # by default bfloat16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    # A copy: the next request writes where this one's answer is.
    return lambda images: torch.from_numpy(request.infer({0: images.numpy()})[0].copy())


_OPEN: Final[Mapping[Kind, Callable[[nn.Module, tuple[int, int, int], torch.device], Run]]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
