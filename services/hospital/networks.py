"""The hospital's networks: torchvision's VGG to classify and MONAI's U-Net to segment, narrowed to the data."""

from itertools import pairwise
from typing import Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.vgg import VGG, cfgs, make_layers

from services.protocol.errors import ServiceError

Depth = Literal["vgg11", "vgg13", "vgg16", "vgg19"]
"""Which of torchvision's VGG plans."""

CLASSIFIER_SIDE: Final = 32  # at least: five halvings leave one pixel
SEGMENTER_SIDE: Final = 32  # at least: four halvings leave 2 x 2, so that the lowest level still has a neighbourhood
SEGMENTER_MULTIPLE: Final = 16  # four halvings without a remainder

_PLANS: Final[dict[Depth, str]] = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # torchvision's letters
_POOLED_SIDE: Final = 2  # torchvision pools to 7 x 7 for 224 px; 2 x 2 is what 64 px leave
_FEATURES: Final = (64, 64, 128, 256, 256, 64)  # of the five levels downwards, and of the last one upwards
_CHANNEL_MULTIPLE: Final = 8  # whole vector registers


class _Normalize(nn.Module):
    """Maps [0,1] to [-2,2], about zero mean and unit variance."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5) * 4.0


class _BinaryLogits(nn.Module):
    """Puts a plane of zeros before the one plane (N,1,H,W): softmax over (0, l) is (1 - sigmoid(l), sigmoid(l))."""

    def forward(self, plane: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(plane), plane], dim=1)


def classifier(channels: int, classes: int, *, width: float, depth: Depth) -> nn.Module:
    """Builds an untrained VGG: images (N,C,H,W) float32 in [0,1], H and W at least 32, to logits (N,K).

    `width` is the factor on torchvision's channel counts (64 to 512), rounded to multiples of 8.
    """
    plan: list[str | int] = ["M" if step == "M" else _narrowed(int(step), width) for step in cfgs[_PLANS[depth]]]
    features = make_layers(plan, batch_norm=True)
    first = cast(nn.Conv2d, features[0])
    if channels != first.in_channels:
        features[0] = nn.Conv2d(channels, first.out_channels, kernel_size=3, padding=1)
    with torch.device("meta"):  # torchvision's head has 120 million weights and is replaced at once: never allocate it
        model = VGG(features, init_weights=False)
    last = int(plan[-2])
    model.avgpool = nn.AdaptiveAvgPool2d(_POOLED_SIDE)
    model.classifier = nn.Sequential(
        nn.Linear(last * _POOLED_SIDE**2, last),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(last, classes),
    )
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
    return nn.Sequential(_Normalize(), model)


def segmenter(channels: int, classes: int, *, width: float) -> nn.Module:
    """Builds an untrained U-Net: images (N,C,H,W) float32 in [0,1] to logits (N,K,H,W); 0 for the first of two classes.

    MONAI's BasicUNet (Falk et al., Nature Methods 16, 2019) with batch normalisation. H and W are multiples of 16, at
    least 32. `width` is the factor on its channel counts (64 to 256), rounded to multiples of 8; 0.25 gives 305
    thousand parameters. Raises ServiceError if MONAI is not installed.
    """
    try:
        from monai.networks.nets import BasicUNet  # takes seconds, which a classifier's hospital need not wait
    except ModuleNotFoundError as error:
        raise ServiceError(f"a segmenter needs MONAI ({error}): pip install 'zo-gateway[segmentation]'") from error
    features = tuple(_narrowed(count, width) for count in _FEATURES)
    planes = 1 if classes == 2 else classes
    # Batch normalisation, not MONAI's default: it can be folded away, and an answer does not hang on a single frame.
    network = BasicUNet(spatial_dims=2, in_channels=channels, out_channels=planes, features=features, norm="batch")
    return nn.Sequential(_Normalize(), network, *([_BinaryLogits()] if classes == 2 else []))


def folded(model: nn.Module) -> nn.Module:
    """Folds batch normalisations into their convolutions, in place; the function stays the same up to rounding.

    Assumes that the module registered after a convolution is the one that it feeds, as in both networks.
    """
    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    for (conv_name, conv), (norm_name, norm) in pairwise(leaves):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(norm_name, nn.Identity())
    return model


def _narrowed(channels: int, width: float) -> int:
    """Returns the scaled channel count, a multiple of 8 and at least 8."""
    return max(_CHANNEL_MULTIPLE, round(channels * width / _CHANNEL_MULTIPLE) * _CHANNEL_MULTIPLE)
