"""Procedural images to try the software on: brain-like slices of four classes, and polyp-like frames with masks.

They are drawn from ellipses, textures and blobs, look real enough to need a trained network, and prove nothing about
patients. Each image has its own generator, seeded with (seed, index), so it does not depend on how many are drawn.
"""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BRAIN_LABELS: Final = ("glioma", "meningioma", "notumor", "pituitary")

_CHUNK: Final = 64  # images drawn at once: maps of this size stay in the cache
_BRAIN_NUMBERS: Final = 96  # random numbers that shape one brain
_POLYP_NUMBERS: Final = 48
_HARMONICS: Final = 4
_TEXTURE_SIDE: Final = 16
_BROAD_SIDE: Final = 4


class _Draws:
    """Uniform numbers of a chunk of images, handed out in order; each shaped (N,1,1) to go with (N,S,S) maps."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._next = 0

    def uniform(self, low: float, high: float) -> Tensor:
        column = self._numbers[:, self._next].view(-1, 1, 1)
        self._next += 1
        return low + (high - low) * column

    def chance(self, probability: float) -> Tensor:
        return (self.uniform(0, 1) < probability).float()


def brain_phantoms(count: int, *, size: int = 64, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """Draws brain-like slices (N,1,S,S) float32 in [0,1], in 256 levels, and labels (N,) numbered as `BRAIN_LABELS`.

    Gliomas are irregular, inside the brain, with a bright rim, a dark core and swelling; meningiomas are even and
    sit on the skull; pituitary tumours are small and even, in the midline at the base. All classes, which take turns
    from index `first` on, have bright spots, and a random contrast, pose, bias field and noise.
    """
    labels = torch.arange(first, first + count) % len(BRAIN_LABELS)
    chunks = []
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        numbers, noise, textures = _randomness(seed, range(first + start, first + stop), size, _BRAIN_NUMBERS)
        chunks.append(_draw_brains(_Draws(numbers), labels[start:stop], noise, textures, size))
    images = torch.cat(chunks) if chunks else torch.zeros(0, size, size)
    return _eight_bits(images).unsqueeze(1), labels


def polyp_phantoms(count: int, *, size: int = 64, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
    """Draws endoscopy-like frames (N,3,S,S) float32 in [0,1], in 256 levels, and masks (N,1,S,S), 1 on the polyp.

    Reddish folded mucosa in uneven light; the polyp is a shaded bulge, often of similar colour. `first` is the index of
    the first frame.
    """
    images, masks = [torch.zeros(0, 3, size, size)], [torch.zeros(0, size, size)]
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        numbers, noise, textures = _randomness(seed, range(first + start, first + stop), size, _POLYP_NUMBERS)
        frames, mask = _draw_polyps(_Draws(numbers), noise, textures, size)
        images.append(frames)
        masks.append(mask)
    return _eight_bits(torch.cat(images)), torch.cat(masks).unsqueeze(1)


def _randomness(seed: int, indices: range, size: int, numbers: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Draws each image's uniform numbers, its pixel noise (N,S,S), and its fine and broad textures (N,S,S)."""
    drawn = []
    for index in indices:
        rng = np.random.default_rng((seed, index))
        uniform = rng.random(numbers, dtype=np.float32)
        normal = rng.standard_normal(size**2 + _TEXTURE_SIDE**2 + _BROAD_SIDE**2, dtype=np.float32)
        drawn.append((uniform, normal))
    uniforms = torch.from_numpy(np.stack([pair[0] for pair in drawn]))
    normals = torch.from_numpy(np.stack([pair[1] for pair in drawn]))
    noise, fine, broad = normals.split([size**2, _TEXTURE_SIDE**2, _BROAD_SIDE**2], dim=1)
    return uniforms, noise.view(-1, size, size), (_enlarged(fine, size), _enlarged(broad, size))


def _enlarged(normals: Tensor, size: int) -> Tensor:
    """Turns (N,s*s) numbers into smooth maps (N,S,S)."""
    side = int(normals.shape[1] ** 0.5)
    grid = normals.view(-1, 1, side, side)
    return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=False).squeeze(1)


def _axes(size: int) -> tuple[Tensor, Tensor]:
    """Returns x to the right and y downwards, both (1,S,S), from -1 to 1."""
    line = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x[None], y[None]


def _inside(distance: Tensor, softness: float | Tensor = 0.03) -> Tensor:
    """Turns a signed distance (negative inside) into a soft mask in [0,1]."""
    return torch.sigmoid(-distance / softness)


def _blob(draws: _Draws, x: Tensor, y: Tensor, radius: Tensor, stretch: Tensor, wobble: float) -> Tensor:
    """Returns the signed distance from an ellipse about the origin whose outline wobbles by a share of its radius."""
    turn = draws.uniform(0, 2 * np.pi)
    u, v = x * torch.cos(turn) + y * torch.sin(turn), y * torch.cos(turn) - x * torch.sin(turn)
    u, v = u / stretch, v * stretch
    angle = torch.atan2(v, u)
    outline = torch.ones_like(angle)
    for order in range(2, 2 + _HARMONICS):
        outline = outline + draws.uniform(0, wobble / order) * torch.cos(order * angle + draws.uniform(0, 2 * np.pi))
    return torch.hypot(u, v) - radius * outline


def _draw_brains(draws: _Draws, labels: Tensor, noise: Tensor, textures: tuple[Tensor, Tensor], size: int) -> Tensor:
    fine, broad = textures
    glioma, meningioma, pituitary = ((labels == label).float().view(-1, 1, 1) for label in (0, 1, 3))
    x, y = _axes(size)
    turn = draws.uniform(-0.3, 0.3)
    x, y = x - draws.uniform(-0.08, 0.08), y - draws.uniform(-0.08, 0.08)
    x, y = x * torch.cos(turn) + y * torch.sin(turn), y * torch.cos(turn) - x * torch.sin(turn)
    width, height = draws.uniform(0.64, 0.8), draws.uniform(0.78, 0.93)
    x, y = x / width, y / height
    r = torch.hypot(x, y) + 0.02 * broad

    # Tissues, from the outside in. Two families of contrast: fluid dark (T1-like) or fluid bright (T2-like).
    bright_fluid = draws.chance(0.35)
    fluid = torch.where(bright_fluid > 0, draws.uniform(0.6, 0.8), draws.uniform(0.06, 0.18))
    grey = draws.uniform(0.32, 0.46)
    white = grey + torch.where(bright_fluid > 0, draws.uniform(-0.12, -0.04), draws.uniform(0.06, 0.14))
    folds = torch.sin(draws.uniform(9, 14) * torch.atan2(y, x) + 3 * fine) * (r - 0.45).clamp(min=0)
    image = draws.uniform(0.45, 0.85) * _inside(r - 1) * torch.ones_like(r)
    image = torch.lerp(image, draws.uniform(0.03, 0.1).expand_as(r), _inside(r - 0.94))
    image = torch.lerp(image, fluid.expand_as(r), _inside(r - 0.86))
    image = torch.lerp(image, grey + 0.03 * fine, _inside(r - 0.82 + 0.25 * folds.clamp(min=0)))
    image = torch.lerp(image, white + 0.02 * fine, _inside(r - 0.62 + 0.5 * folds, 0.05))
    cleft = _inside(x.abs() - 0.015, 0.012) * _inside(r - 0.84) * (y < -0.35).float()
    image = torch.lerp(image, fluid.expand_as(r), 0.7 * cleft)
    spread, drop, thick = draws.uniform(0.1, 0.18), draws.uniform(-0.2, 0.05), draws.uniform(0.05, 0.12)
    lean = draws.uniform(0.1, 0.4)
    horns = (
        torch.hypot((x.abs() - spread - lean * (y - drop).abs()) / thick, (y - drop) / draws.uniform(0.22, 0.36)) - 1
    )
    image = torch.lerp(image, fluid.expand_as(r), _inside(horns, 0.25))

    # Bright spots without meaning: two vessels anywhere in the brain, a sinus at the skull.
    for _ in range(2):
        where, out = draws.uniform(0, 2 * np.pi), draws.uniform(0.1, 0.75)
        spot = torch.hypot(x - out * torch.cos(where), y - out * torch.sin(where)) - draws.uniform(0.02, 0.07)
        image = image + draws.chance(0.6) * draws.uniform(0.1, 0.3) * _inside(spot)
    where = draws.uniform(0, 2 * np.pi)
    spot = torch.hypot(x - 0.86 * torch.cos(where), y - 0.86 * torch.sin(where)) - draws.uniform(0.03, 0.08)
    image = image + draws.chance(0.5) * draws.uniform(0.1, 0.25) * _inside(spot)

    # Glioma: swelling, rim, core.
    where, out = draws.uniform(0, 2 * np.pi), draws.uniform(0.2, 0.52)
    u, v = x - out * torch.cos(where), y - out * torch.sin(where)
    distance = _blob(draws, u, v, draws.uniform(0.12, 0.3), draws.uniform(0.8, 1.2), 0.6)
    rim = torch.exp(-((distance / draws.uniform(0.03, 0.06)) ** 2))
    swelling = draws.uniform(0.03, 0.15) * torch.where(bright_fluid > 0, 1.0, -1.0)
    lesion = swelling * _inside(distance - 0.12, 0.05) + draws.uniform(0.2, 0.5) * rim
    lesion = lesion - draws.uniform(0.02, 0.2) * _inside(distance + 0.04)
    image = image + glioma * lesion * _inside(r - 0.84)

    # Meningioma: even, based on the skull.
    where, radius = draws.uniform(0, 2 * np.pi), draws.uniform(0.18, 0.36)
    out = 0.84 - radius * draws.uniform(0.3, 0.8)
    u, v = x - out * torch.cos(where), y - out * torch.sin(where)
    distance = _blob(draws, u, v, radius, draws.uniform(0.85, 1.15), 0.12)
    image = image + meningioma * draws.uniform(0.22, 0.5) * _inside(distance) * _inside(r - 0.86)

    # Pituitary tumour: small, even, in the midline at the base.
    u, v = x - draws.uniform(-0.05, 0.05), y - draws.uniform(0.38, 0.6)
    distance = _blob(draws, u, v, draws.uniform(0.1, 0.2), draws.uniform(0.85, 1.15), 0.15)
    image = image + pituitary * draws.uniform(0.22, 0.5) * _inside(distance)

    # The scanner: bias field, gain, gamma, magnitude noise.
    image = image.clamp(0, 1.2) * torch.exp(draws.uniform(0, 0.12) * broad)
    image = (image * draws.uniform(0.7, 1.1)).clamp(0, 1) ** draws.uniform(0.75, 1.35)
    level = draws.uniform(0.005, 0.025)
    return torch.hypot(image + level * noise, level * noise.roll((size // 2, size // 3), dims=(1, 2)))


def _draw_polyps(draws: _Draws, noise: Tensor, textures: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    fine, broad = textures
    x, y = _axes(size)

    # Mucosa: base colour, folds that cross the frame in arcs.
    red, green, blue = draws.uniform(0.45, 0.7), draws.uniform(0.22, 0.4), draws.uniform(0.15, 0.32)
    across = torch.hypot(x - draws.uniform(-2, 2), y - draws.uniform(-2, 2))
    folds = torch.sin(draws.uniform(5, 14) * across + 0.8 * broad + draws.uniform(0, 2 * np.pi))
    shade = 1 + draws.uniform(0.05, 0.18) * folds + 0.03 * fine + 0.08 * broad

    # Polyp: outline, bulge towards the light, own tint.
    u, v = x - draws.uniform(-0.5, 0.5), y - draws.uniform(-0.5, 0.5)
    radius = draws.uniform(0.15, 0.6)
    distance = _blob(draws, u, v, radius, draws.uniform(0.75, 1.3), 0.25)
    mask = (distance < 0).float()
    soft = _inside(distance, 0.02)
    light = draws.uniform(0, 2 * np.pi)
    slope = (u * torch.cos(light) + v * torch.sin(light)) / radius
    bulge = 1 + draws.uniform(0.1, 0.3) * slope.clamp(-1.5, 1.5) + draws.uniform(0, 0.7)
    rim = torch.exp(-((distance / 0.04) ** 2))
    shade = torch.lerp(shade, (shade * 0.4 + 0.6) * bulge, soft) - draws.uniform(0.05, 0.25) * rim
    tint = [draws.uniform(0.92, 1.2), draws.uniform(0.8, 1.4), draws.uniform(0.8, 1.4)]

    # The endoscope: a lamp, dark corners, highlights, noise.
    lamp = torch.exp(
        -((x - draws.uniform(-0.4, 0.4)) ** 2 + (y - draws.uniform(-0.4, 0.4)) ** 2) * draws.uniform(0.2, 1.2)
    )
    corners = _inside(
        torch.maximum(x.abs() + y.abs() - draws.uniform(1.45, 1.9), torch.maximum(x.abs(), y.abs()) - 0.98)
    )
    highlights = ((0.6 * fine + 0.4 * bulge * soft - draws.uniform(1.3, 1.9)) * 6).clamp(0, 1)
    grain = draws.uniform(0.005, 0.03) * noise
    planes = []
    for colour, factor in zip((red, green, blue), tint, strict=True):
        plane = colour * shade * torch.lerp(torch.ones_like(soft), factor.expand_as(soft), soft) * lamp
        plane = torch.lerp(plane, torch.full_like(plane, 0.95), highlights)
        planes.append(plane * corners + grain)
    return torch.stack(planes, dim=1), mask


def _eight_bits(images: Tensor) -> Tensor:
    """Clips to [0,1] and rounds to 256 levels, as files would."""
    return (images.clamp(0, 1) * 255).round() / 255
