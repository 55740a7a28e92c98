"""The defended model as an attacker sees it who has everything: differentiable from the raw image to the scores.

Athalye, Carlini and Wagner, ICML 2018 (EOT; BPDA); Tramer et al., NeurIPS 2020 (on adaptive attacks).
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

_LEAST: Final = 1e-12  # keeps the logarithm finite


class Defended(nn.Module):
    """Sanitizer and victim ((N,C,H,W) -> logits (N,K) or (N,K,H,W)) in one, with the exact gradient of both.

    `identity_backward` lets gradients pass the sanitizer as if it did nothing (backward pass differentiable
    approximation, BPDA): it is near the identity, and where its own gradient leads nowhere, this may lead somewhere.
    """

    def __init__(self, sanitizer: nn.Module, victim: nn.Module, *, identity_backward: bool = False) -> None:
        super().__init__()
        self.sanitizer, self.victim, self.identity_backward = sanitizer, victim, identity_backward

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) -> logits."""
        sanitized = _AsIdentity.apply(images, self.sanitizer) if self.identity_backward else self.sanitizer(images)
        logits: Tensor = self.victim(sanitized)
        return logits


class _AsIdentity(torch.autograd.Function):
    """A function whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(images)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Smoothed(nn.Module):
    """Logits of the smoothed model, from fresh noisy copies in every call: expectation over transformation (EOT).

    `base` maps (N,C,H,W) to logits (N,K) or (N,K,H,W); `sigma` is in units of [0,1].
    """

    def __init__(self, base: nn.Module, sigma: float, copies: int) -> None:
        super().__init__()
        self.base, self.sigma, self.copies = base, sigma, copies

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) -> the logarithm of the mean probabilities, (N,K) or (N,K,H,W)."""
        many = images.repeat_interleave(self.copies, dim=0)
        scores: Tensor = self.base(many + self.sigma * torch.randn_like(many)).softmax(dim=1)
        mean: Tensor = scores.unflatten(0, (len(images), self.copies)).mean(dim=1)
        return mean.clamp_min(_LEAST).log()
