"""What the sanitizer is trained for: the victim's answers stay what they were on the clean image.

Stability and denoising losses of denoised smoothing (Salman et al. 2020, section 3) and ZO-AE-DS (Zhang et al. 2022,
equation 3); per image, so that an estimator can difference them.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreKind = Literal["probabilities", "logits"]


def stability_loss(scores: Tensor, targets: Tensor, kind: ScoreKind) -> Tensor:
    """Cross-entropy of the victim's scores against its own answers on the clean images.

    Args:
        scores: (..., K) probabilities or logits.
        targets: (...) int64 class indices, the victim's argmax on the clean image.
        kind: What the scores are.

    Returns:
        (...) losses in nats; finite also where a probability underflowed to zero.
    """
    return -log_probabilities(scores, kind).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def log_probabilities(scores: Tensor, kind: ScoreKind, floor: float = 0.0) -> Tensor:
    """Log-probabilities of (..., K) scores, in nats.

    Args:
        scores: (..., K) probabilities or logits.
        kind: What the scores are.
        floor: The least probability to answer, before the others are scaled to sum to one again; 0: none, but an
            underflow counts as the smallest normal number, so that all stays finite.
    """
    logs = F.log_softmax(scores, dim=-1) if kind == "logits" else scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    return F.log_softmax(logs.clamp_min(math.log(floor)), dim=-1) if floor else logs


def denoising_loss(sanitized: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error per pixel of (N, C, H, W) sanitized images against the clean ones: (N,)."""
    return (sanitized - clean).square().flatten(1).mean(1)


def inject_gradient(points: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `points` is the given one, averaged over the batch.

    Back-propagating it carries an estimated gradient at the border of the black box into what lies before it
    (ZO-AE-DS, equation 7).

    Args:
        points: (N, ...) with a graph behind it.
        gradient: (N, ...) estimate of the gradient of each image's loss at its point.
    """
    return (points * gradient.detach()).flatten(1).sum(1).mean()
