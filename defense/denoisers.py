"""Denoisers: (N, C, H, W) noisy images to clean ones of the same shape, not clamped."""

from typing import Literal

import torch
from torch import Tensor, nn

from defense.components import PrincipalComponents
from defense.layers import FoldedUNet

DenoiserName = Literal["wiener-unet", "unet", "dncnn", "dncnn-small"]


class DnCNN(nn.Module):
    """DnCNN (Zhang et al. 2017): predicts the noise, by `depth` convolutions of `width` features."""

    def __init__(self, channels: int, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.body = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Denoises (N, C, H, W) images."""
        denoised: Tensor = images - self.body(images)
        return denoised


class UNetDenoiser(nn.Module):
    """A folded U-Net that predicts the noise of images of `channels` channels."""

    def __init__(self, channels: int, width: int = 24) -> None:
        super().__init__()
        self.body = FoldedUNet(channels, channels, width)

    def forward(self, images: Tensor) -> Tensor:
        """Denoises (N, C, H, W) images."""
        denoised: Tensor = images - self.body(images)
        return denoised


class WienerUNetDenoiser(nn.Module):
    """An empirical Wiener filter on `components` principal components, and a folded U-Net for what it leaves.

    Aligned images of one kind hold most of their energy in a few hundred components b_k. On those the best linear
    denoiser is y = mean + sum_k v_k / (v_k + s^2) c_k b_k, v_k the variance along b_k; the image's noise s^2 is read
    off what lies outside the components. The U-Net sees the filtered image and the residual.
    """

    def __init__(self, shape: tuple[int, int, int], components: int, width: int = 24) -> None:
        super().__init__()
        self.components = PrincipalComponents(shape, components)
        self.body = FoldedUNet(2 * shape[0], shape[0], width)

    def filter(self, images: Tensor) -> Tensor:
        """The Wiener filter alone."""
        coefficients = self.components.project(images)
        outside = (images - self.components.expand(coefficients)).flatten(1)
        count, dimension = self.components.basis.shape
        noise = outside.square().sum(1, keepdim=True) / (dimension - count)
        variance = self.components.variance
        return self.components.expand(coefficients * variance / (variance + noise))

    def forward(self, images: Tensor) -> Tensor:
        """Denoises (N, C, H, W) images of the shape it was made for."""
        filtered = self.filter(images)
        denoised: Tensor = filtered + self.body(torch.cat([filtered, images - filtered], dim=1))
        return denoised


def build_denoiser(name: DenoiserName, shape: tuple[int, int, int], components: int) -> nn.Module:
    """Makes a denoiser of (C, H, W) images by name.

    "wiener-unet": the best for its cost on aligned images, and alone in its use of `components`. "unet": for images
    that are not aligned. "dncnn": the published one, for a GPU. "dncnn-small": depth 7, width 32.
    """
    match name:
        case "wiener-unet":
            return WienerUNetDenoiser(shape, components)
        case "unet":
            return UNetDenoiser(shape[0])
        case "dncnn":
            return DnCNN(shape[0])
        case "dncnn-small":
            return DnCNN(shape[0], depth=7, width=32)
