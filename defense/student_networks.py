"""Small networks that learn a black box from its answers; they are asked for gradients, not for accuracy.

Smooth activations and average pooling agree with the victim's gradients sooner than rectifiers and maximum pooling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.layers import pad_to_multiple

_FOLD = 2  # blocks of so many pixels a side become channels: convolutions of the full image are what costs
_WIDTHS = (16, 32, 64, 64)


class StudentNetwork(nn.Module):
    """A plain convolutional classifier of (C, H, W) images: up to four stages, each halving the image."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape[0] * _FOLD**2, -(-shape[1] // _FOLD), -(-shape[2] // _FOLD)
        layers: list[nn.Module] = []
        for stage, features in enumerate(_WIDTHS):
            if min(height, width) < 2:
                break
            layers += [*_block(channels, features, 1 if stage == 0 else 2), nn.AvgPool2d(2)]
            channels, height, width = features, height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] to (N, K) logits."""
        logits: Tensor = self.head(self.features(_folded(images, _FOLD)).flatten(1))
        return logits


class DenseStudentNetwork(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of the same stages, with bilinear upsampling, for segmenters' answers."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels = shape[0] * _FOLD**2
        down, up = [], []
        for stage, features in enumerate(_WIDTHS):
            down.append(nn.Sequential(*_block(channels, features, 1 if stage == 0 else 2)))
            channels = features
        for features in reversed(_WIDTHS[:-1]):
            up.append(nn.Sequential(*_block(channels + features, features, 1)))
            channels = features
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.head = nn.Conv2d(channels, classes * _FOLD**2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [0, 1] to (N, K, H, W) logits."""
        features = _folded(images, _FOLD * 2 ** (len(_WIDTHS) - 1))
        seen = []
        for stage, block in enumerate(self.down):
            features = block(F.avg_pool2d(features, 2) if stage else features)
            seen.append(features)
        for block, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            larger = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            features = block(torch.cat([larger, beside], dim=1))
        return F.pixel_shuffle(self.head(features), _FOLD)[..., : images.shape[2], : images.shape[3]]


def _block(channels: int, features: int, convolutions: int) -> Sequence[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features), nn.GELU()]
        channels = features
    return layers


def _folded(images: Tensor, multiple: int) -> Tensor:
    """Images padded to a multiple of so many pixels, centred, blocks of pixels as channels."""
    return F.pixel_unshuffle((pad_to_multiple(images, multiple) - 0.5) * 4, _FOLD)
