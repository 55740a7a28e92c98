"""Preprocessors that learn nothing: (N,C,H,W) float32 images of any finite range to the same shape, type and device."""

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

Preprocessor = Callable[[Tensor], Tensor]

JPEG_QUALITY: Final = 75
BLUR_KERNEL: Final = 5
BLUR_SIGMA: Final = 1.0
MEDIAN_SIDE: Final = 3


def jpeg(images: Tensor, quality: int = JPEG_QUALITY) -> Tensor:
    """Clamps to [0,1], compresses to JPEG and back: 8 bits, Pillow's quality, its default 4:2:0 chroma for RGB."""
    levels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.stack([_through_jpeg(pixels, quality) for pixels in levels])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images.device, torch.float32) / 255


def blur(images: Tensor) -> Tensor:
    """Gaussian blur, 5 x 5 pixels, standard deviation 1 pixel, the border reflected."""
    blurred: Tensor = gaussian_blur(images, [BLUR_KERNEL, BLUR_KERNEL], [BLUR_SIGMA, BLUR_SIGMA])
    return blurred


def median(images: Tensor) -> Tensor:
    """Median of every 3 x 3 neighbourhood, channel by channel, the border reflected."""
    margin = MEDIAN_SIDE // 2
    padded = F.pad(images, (margin, margin, margin, margin), mode="reflect")
    neighbours = padded.unfold(2, MEDIAN_SIDE, 1).unfold(3, MEDIAN_SIDE, 1)
    return neighbours.flatten(-2).median(dim=-1).values


PREPROCESSORS: Final[Mapping[str, Preprocessor]] = MappingProxyType({"jpeg": jpeg, "blur": blur, "median": median})


def _through_jpeg(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], quality: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(H,W,C) through bytes made here, which need none of the care for bytes from outside."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).reshape(pixels.shape)
