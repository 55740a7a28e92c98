"""The noise that sanitizers learn to remove."""

import torch
from torch import Tensor


def with_noise(clean: Tensor, sigma: float, generator: torch.Generator, below: float = 0.0) -> Tensor:
    """Adds Gaussian noise, of a lower level to some of the images.

    Certificates are about noise of the full sigma, but the gateway's deterministic pass sees images without any: a
    sanitizer that knows only one level would blur them.

    Args:
        clean: (N, C, H, W), on any device.
        sigma: Standard deviation.
        generator: On the CPU.
        below: Share of the images that get any level between none and sigma.
    """
    level: Tensor | float = sigma
    if below:
        uniform = torch.rand(len(clean), 1, 1, 1, generator=generator)
        level = (sigma * (uniform / below).clamp_max(1)).to(clean.device)
    return clean + level * torch.randn(clean.shape, generator=generator).to(clean.device)
