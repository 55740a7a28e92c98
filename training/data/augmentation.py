"""Random variations of training images, each image its own: pose and light, as between two recordings."""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_ANGLE: Final = math.radians(12)
_MAX_SCALE: Final = 0.1
_MAX_SHIFT: Final = 0.08  # of half the side
_MAX_CONTRAST: Final = 0.15

# Of frames: an endoscope has no upright, and stands near or far.
_FRAME_ANGLE: Final = math.radians(15)  # beside the quarter turns
_FRAME_SCALE: Final = 0.25
_FRAME_SHIFT: Final = 0.15
_FRAME_CONTRAST: Final = 0.25
_FRAME_BRIGHTNESS: Final = 0.2
_FRAME_TINT: Final = 0.1  # of each colour apart
_FRAME_DRAWS: Final = 8  # random numbers a frame, besides one a colour


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Varies images (N,C,H,W) in [0,1] as between two scanners: flip, rotation, scale, shift and contrast.

    What the old frame does not show is black. The generator is on the CPU.
    """
    draws = _draws(6, len(images), generator).to(images.device)
    grid = _grid(images, draws[0] * _MAX_ANGLE, 1 + draws[1] * _MAX_SCALE, draws[2], draws[3:5] * _MAX_SHIFT)
    moved = F.grid_sample(images, grid, align_corners=False)
    return (moved * (1 + draws[5] * _MAX_CONTRAST).view(-1, 1, 1, 1)).clamp(0, 1)


def augment_frames(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Varies pose and light as between two endoscopes: one of the square's eight symmetries, and small changes.

    These are rotation, scale, shift, contrast about the mean, brightness and tint. The generator is on the CPU.

    Args:
        images: (N,C,S,S) in [0,1].
        masks: (N,S,S) int64 classes of the pixels.
        generator: Source of randomness.

    Returns:
        Images and masks in the same pose; black and class 0 where the old frame shows nothing.
    """
    count, channels = images.shape[:2]
    draws = _draws(_FRAME_DRAWS + channels, count, generator).to(images.device)
    quarter_turns = ((draws[0] + 1) * 2).floor()
    angle = quarter_turns * (math.pi / 2) + draws[1] * _FRAME_ANGLE
    grid = _grid(images, angle, 1 + draws[2] * _FRAME_SCALE, draws[3], draws[4:6] * _FRAME_SHIFT)
    moved = F.grid_sample(images, grid, align_corners=False)
    # The nearest: there is nothing between two classes.
    moved_masks = F.grid_sample(masks.unsqueeze(1).float(), grid, mode="nearest", align_corners=False)
    mean = moved.mean((2, 3), keepdim=True)
    contrast, brightness = (
        (1 + draw * limit).view(-1, 1, 1, 1)
        for draw, limit in zip(draws[6:8], (_FRAME_CONTRAST, _FRAME_BRIGHTNESS), strict=True)
    )
    tint = (1 + draws[_FRAME_DRAWS:].T * _FRAME_TINT).view(count, channels, 1, 1)
    lit = ((moved - mean) * contrast + mean) * brightness * tint
    return lit.clamp(0, 1), moved_masks.squeeze(1).long()


def _draws(kinds: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (kinds,N) in [-1,1)."""
    return torch.rand((kinds, count), generator=generator) * 2 - 1


def _grid(images: Tensor, angle: Tensor, scale: Tensor, side: Tensor, shift: Tensor) -> Tensor:
    """Where each pixel of the new frame is in the old one, (N,H,W,2), for `grid_sample`.

    `angle` (N,) in radians; `scale` (N,) of the new frame's width; `side` (N,) negative to mirror; `shift` (2,N) right
    and down, in halves of the side.
    """
    flip = torch.where(side < 0, -1.0, 1.0)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = (cosine * flip, -sine, shift[0], sine * flip, cosine, shift[1])
    pose = torch.stack(rows, dim=1).view(len(images), 2, 3)
    return F.affine_grid(pose, list(images.shape), align_corners=False)
