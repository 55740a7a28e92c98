"""The defended model as an attacker sees it who has everything: differentiable from the raw image to the scores.

Sources: Athalye, Carlini and Wagner, ICML 2018 (expectation over transformation, EOT; backward pass differentiable
approximation, BPDA); Tramer et al., NeurIPS 2020 (on adaptive attacks).
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

_LEAST: Final = 1e-12  # keeps the logarithm finite


class Defended(nn.Module):
    """Sanitizer and victim in one, with the exact gradient of both.

    Args:
        sanitizer: (N,C,H,W) -> (N,C,H,W).
        victim: (N,C,H,W) -> logits (N,K) or (N,K,H,W).
        identity_backward: Let gradients pass the sanitizer as if it did nothing (BPDA): a sanitizer is near the
            identity, and where its own gradient leads nowhere, this may lead somewhere.
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
    """Logits of the smoothed model, estimated from fresh noisy copies in every call: EOT over the noise.

    Args:
        base: (N,C,H,W) -> logits (N,K) or (N,K,H,W): sanitizer and victim.
        sigma: Standard deviation of the noise, in units of [0,1].
        copies: Noisy copies of each image.
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
