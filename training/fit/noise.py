"""The noise that sanitizers learn to remove."""

import torch
from torch import Tensor


def with_noise(clean: Tensor, sigma: float, generator: torch.Generator, below: float = 0.0) -> Tensor:
    """Adds Gaussian noise to images (N, C, H, W), to a share `below` of them with a level drawn from [0, sigma].

    Certificates use noise of the full sigma, but the gateway's deterministic pass sees none: a sanitizer that knows
    only one level would blur those images. The generator is on the CPU.
    """
    level: Tensor | float = sigma
    if below:
        uniform = torch.rand(len(clean), 1, 1, 1, generator=generator)
        level = (sigma * (uniform / below).clamp_max(1)).to(clean.device)
    return clean + level * torch.randn(clean.shape, generator=generator).to(clean.device)
