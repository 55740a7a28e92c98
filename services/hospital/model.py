"""The hospital's model, and its file on disk.

A victim directory holds `model.safetensors`: weights, and the configuration as JSON in its metadata. Loading it cannot
execute code.
"""

from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from services.hospital.networks import (
    CLASSIFIER_SIDE,
    SEGMENTER_MULTIPLE,
    SEGMENTER_SIDE,
    Depth,
    classifier,
    folded,
    segmenter,
)
from services.protocol.errors import ServiceError

FILE_NAME: Final = "model.safetensors"
FORMAT: Final = "zo-gateway-victim-1"

Task = Literal["classification", "segmentation"]
"""What a model answers: a class for an image, or a class for every pixel."""


class VictimFileError(ServiceError):
    """A victim's file is missing or malformed; the message says which and why."""


class VictimConfig(BaseModel):
    """What a victim is: enough to build it and to check what is sent to it.

    Attributes:
        labels: Class names, in the order of the scores.
        task: Whether it classifies images (a VGG) or pixels (a U-Net).
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width in pixels, each at least 32; a segmenter's are multiples of 16.
        width: Factor on the channel counts (VGG 64 to 512, U-Net 64 to 256), rounded to multiples of 8.
        depth: torchvision's VGG plan, by default vgg11; None for a segmenter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...] = Field(min_length=2)
    task: Task = "classification"
    channels: Literal[1, 3] = 1
    size: tuple[int, int] = (64, 64)
    width: float = Field(default=0.25, gt=0, le=1)
    depth: Depth | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_depth(cls, fields: Any) -> Any:
        """Fills in the task's default depth."""
        if isinstance(fields, dict) and fields.get("task", "classification") == "classification":
            return {"depth": "vgg11", **fields}
        return fields

    def model_post_init(self, _context: object) -> None:
        """Checks what the field types cannot say."""
        height, width = self.size
        if self.task == "segmentation":
            if min(self.size) < SEGMENTER_SIDE or height % SEGMENTER_MULTIPLE or width % SEGMENTER_MULTIPLE:
                raise ValueError(
                    f"a segmenter's size must be multiples of {SEGMENTER_MULTIPLE}, at least {SEGMENTER_SIDE} x "
                    f"{SEGMENTER_SIDE}, got {height} x {width}"
                )
            if self.depth is not None:
                raise ValueError(f"depth {self.depth} names a classifier's plan: a segmenter takes none, only a width")
        else:
            if min(self.size) < CLASSIFIER_SIDE:
                raise ValueError(f"size must be at least {CLASSIFIER_SIDE} x {CLASSIFIER_SIDE}, got {height} x {width}")
            if self.depth is None:
                raise ValueError("a classifier needs a depth")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")


def build_victim(config: VictimConfig) -> nn.Module:
    """Builds an untrained victim: images (N,C,H,W) float32 in [0,1] to logits, (N,K) or, of a segmenter, (N,K,H,W).

    Raises ServiceError if a segmenter needs MONAI and it is not installed.
    """
    if config.depth is None:
        return segmenter(config.channels, len(config.labels), width=config.width)
    return classifier(config.channels, len(config.labels), width=config.width, depth=config.depth)


def victim_bytes(model: nn.Module, config: VictimConfig) -> bytes:
    """The content of a victim's file, which `load_victim` reads; `model` is what `build_victim` built, trained."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(state, metadata={"format": FORMAT, "config": config.model_dump_json()})


def load_victim(directory: str | Path) -> tuple[nn.Module, VictimConfig]:
    """Reads a victim from its directory, for inference only, on the CPU.

    It is in evaluation mode, channels last, with batch normalisations folded into convolutions; about twice as fast.

    Raises:
        VictimFileError: The file is missing or invalid, or its weights do not fit its configuration.
        ServiceError: A segmenter needs MONAI, and it is not installed.
    """
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        raise VictimFileError(f"no victim at {path}: train one with python -m training.victim_fit --out {directory}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise VictimFileError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT:
        raise VictimFileError(f"{path} is no victim: its header says format {metadata.get('format')!r}, not {FORMAT!r}")
    try:
        config = VictimConfig.model_validate_json(metadata.get("config", ""))
        model = build_victim(config)
        model.load_state_dict(state)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise VictimFileError(f"{path} has a malformed configuration: {where}: {problem['msg']}") from error
    except RuntimeError as error:
        raise VictimFileError(f"{path} holds weights that do not fit its configuration {config}") from error
    return folded(model.eval()).to(memory_format=torch.channels_last), config
