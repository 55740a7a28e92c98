"""The hospital's classifier: torchvision's VGG, narrowed to the data, and its one file on disk.

A victim directory holds `model.safetensors`: the weights, and in the header's metadata the configuration as JSON.
Nothing that is loaded here can execute code.
"""

from pathlib import Path
from typing import Final, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.vgg import VGG, cfgs, make_layers

from services.protocol.errors import ServiceError

FILE_NAME: Final = "model.safetensors"
FORMAT: Final = "zo-gateway-victim-1"
MINIMUM_SIDE: Final = 32  # five halvings leave one pixel

_PLANS: Final = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # torchvision's letters
_POOLED_SIDE: Final = 2  # torchvision pools to 7 x 7 for 224 px; 2 x 2 is what 64 px leave
_CHANNEL_MULTIPLE: Final = 8  # whole vector registers


class VictimFileError(ServiceError):
    """A victim's file is missing or malformed; the message says which and why."""


class VictimConfig(BaseModel):
    """What a victim is: enough to build it and to check what is sent to it.

    Attributes:
        labels: Class names, in the order of the scores.
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width of the input in pixels, each at least 32.
        width: Factor on torchvision's channel counts (64 to 512), rounded to multiples of 8.
        depth: Which of torchvision's VGG plans.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...] = Field(min_length=2)
    channels: Literal[1, 3] = 1
    size: tuple[int, int] = (64, 64)
    width: float = Field(default=0.25, gt=0, le=1)
    depth: Literal["vgg11", "vgg13", "vgg16", "vgg19"] = "vgg11"

    def model_post_init(self, _context: object) -> None:
        """Checks what the field types cannot say."""
        if min(self.size) < MINIMUM_SIDE:
            raise ValueError(
                f"size must be at least {MINIMUM_SIDE} x {MINIMUM_SIDE}, got {self.size[0]} x {self.size[1]}"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")


class _Normalize(nn.Module):
    """Maps [0,1] to [-2,2], about zero mean and unit variance."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5) * 4.0


def build_victim(config: VictimConfig) -> nn.Module:
    """Builds an untrained victim.

    Args:
        config: Its shape.

    Returns:
        A module that maps images (N,C,H,W) float32 in [0,1] to logits (N,K); normalisation is its first layer.
    """
    plan: list[str | int] = [
        "M" if step == "M" else _narrowed(int(step), config.width) for step in cfgs[_PLANS[config.depth]]
    ]
    features = make_layers(plan, batch_norm=True)
    first = cast(nn.Conv2d, features[0])
    if config.channels != first.in_channels:
        features[0] = nn.Conv2d(config.channels, first.out_channels, kernel_size=3, padding=1)
    with torch.device("meta"):  # torchvision's head has 120 million weights and is replaced at once: never allocate it
        model = VGG(features, init_weights=False)
    last = int(plan[-2])
    model.avgpool = nn.AdaptiveAvgPool2d(_POOLED_SIDE)
    model.classifier = nn.Sequential(
        nn.Linear(last * _POOLED_SIDE**2, last),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(last, len(config.labels)),
    )
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    return nn.Sequential(_Normalize(), model)


def victim_bytes(model: nn.Module, config: VictimConfig) -> bytes:
    """What a victim's file holds; `load_victim` reads it.

    Args:
        model: What `build_victim(config)` built, trained.
        config: Its configuration.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(state, metadata={"format": FORMAT, "config": config.model_dump_json()})


def load_victim(directory: str | Path) -> tuple[nn.Module, VictimConfig]:
    """Reads a victim from its directory.

    Returns:
        The module, on the CPU, and its configuration. It is for answering, not for more training: in evaluation mode,
        laid out channels last, with each batch normalisation folded into its convolution; about twice as fast.

    Raises:
        VictimFileError: The file is missing, no victim's file, or its weights do not fit its configuration.
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
    return _folded(model.eval()).to(memory_format=torch.channels_last), config


def _folded(model: nn.Module) -> nn.Module:
    """Folds the batch normalisations, in place; the function stays the same up to rounding."""
    vgg = cast(VGG, cast(nn.Sequential, model)[1])
    layers: list[nn.Module] = []
    for layer in cast(nn.Sequential, vgg.features):
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(cast(nn.Conv2d, layers[-1]), layer)
        else:
            layers.append(layer)
    vgg.features = nn.Sequential(*layers)
    return model


def _narrowed(channels: int, width: float) -> int:
    """Returns the scaled channel count, a multiple of 8 and at least 8."""
    return max(_CHANNEL_MULTIPLE, round(channels * width / _CHANNEL_MULTIPLE) * _CHANNEL_MULTIPLE)
