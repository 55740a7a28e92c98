"""What scanners, cameras and archives do to images, at three severities.

After Hendrycks and Dietterich (ICLR 2019), without the kinds that move pixels: masks would have to move with them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from torch import Generator, Tensor, randn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as change

from defense.preprocessors import jpeg

SEVERITIES: Final = (1, 2, 3)


def corrupt(name: str, images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Changes images (N,C,H,W) float32 in [0,1] in one way, a key of `CORRUPTIONS`; `seed` is that of noise.

    Raises ValueError if there is no such kind or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"no corruption {name!r} of severity {severity}; there are {', '.join(CORRUPTIONS)}, 1 to 3")
    return CORRUPTIONS[name](images, severity, Generator().manual_seed(seed)).clamp(0, 1)


def _noise(images: Tensor, severity: int, generator: Generator) -> Tensor:
    return images + 0.04 * severity * randn(images.shape, generator=generator).to(images.device)


def _blur(images: Tensor, severity: int, _: Generator) -> Tensor:
    blurred: Tensor = change.gaussian_blur(images, [9, 9], [0.5 * severity, 0.5 * severity])
    return blurred


def _jpeg(images: Tensor, severity: int, _: Generator) -> Tensor:
    return jpeg(images, quality=(60, 30, 10)[severity - 1])


def _pixelate(images: Tensor, severity: int, _: Generator) -> Tensor:
    height, width = images.shape[2:]
    share = (0.6, 0.4, 0.25)[severity - 1]
    few = F.interpolate(images, size=(max(round(share * height), 1), max(round(share * width), 1)), mode="area")
    return F.interpolate(few, size=(height, width), mode="nearest")


def _brighter(images: Tensor, severity: int, _: Generator) -> Tensor:
    return images + 0.07 * severity


def _darker(images: Tensor, severity: int, _: Generator) -> Tensor:
    return images * (1 - 0.2 * severity)


def _contrast(images: Tensor, severity: int, _: Generator) -> Tensor:
    less: Tensor = change.adjust_contrast(images, 1 - 0.2 * severity)
    return less


def _gamma(images: Tensor, severity: int, _: Generator) -> Tensor:
    changed: Tensor = change.adjust_gamma(images, 1 + 0.3 * severity)
    return changed


CORRUPTIONS: Final[Mapping[str, Callable[[Tensor, int, Generator], Tensor]]] = MappingProxyType(
    {
        "noise": _noise,
        "blur": _blur,
        "jpeg": _jpeg,
        "pixelate": _pixelate,
        "brighter": _brighter,
        "darker": _darker,
        "contrast": _contrast,
        "gamma": _gamma,
    }
)
