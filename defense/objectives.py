"""What the sanitizer is trained for: the victim's answers stay what they were on the clean image.

Losses per image of denoised smoothing (Salman et al. 2020, section 3) and ZO-AE-DS (Zhang et al. 2022, equation 3).
Scores have their K classes at axis 1: (N, K) of a classifier, (N, K, H, W) of a segmenter.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ScoreKind = Literal["probabilities", "logits"]

_SMOOTH = 1.0  # pixels added to both sides of the soft Dice, which so is defined for empty masks


def stability_loss(scores: Tensor, targets: Tensor, kind: ScoreKind) -> Tensor:
    """(N,) finite losses of the victim's scores against its own answers on the clean images, the argmax `targets`.

    Of classes (N, K) the cross-entropy, in nats; of masks (N, K, H, W) the mean cross-entropy of the pixels plus the
    soft Dice loss in [0, 1] (Isensee et al. 2021): the first alone would count a lost small lesion as next to nothing.
    """
    entropy = _cross_entropy(scores, targets, kind)
    if entropy.ndim == 1:
        return entropy
    return entropy.flatten(1).mean(1) + (1 - _soft_dice(_probabilities(scores, kind), targets)).mean(1)


def located_loss(scores: Tensor, targets: Tensor, kind: ScoreKind, around: Tensor) -> Tensor:
    """The stability loss of masks as losses (N, H, W) of pixels, the soft Dice linearised in the probabilities.

    At the scores `around`, (N, K, H, W) like `scores`, value and gradient of the sum are those of `stability_loss`.
    """
    pixels = targets[0].numel()
    before, now = _probabilities(around, kind), _probabilities(scores, kind)
    dice = _soft_dice(before, targets)  # (N, K - 1)
    size = before[:, 1:].flatten(2).sum(2) + _foreground(targets, scores.shape[1]).flatten(2).sum(2) + _SMOOTH
    right = 2 * _foreground(targets, scores.shape[1]) - dice[..., None, None]
    change = (right / size[..., None, None] * (now - before)[:, 1:]).mean(1)
    return _cross_entropy(scores, targets, kind) / pixels + (1 - dice).mean(1).view(-1, 1, 1) / pixels - change


def agreement(answers: Tensor, targets: Tensor) -> Tensor:
    """(N,) agreement of answers with targets: 1 or 0 of classes (N,), the Dice of what is not 0 of masks (N, H, W)."""
    same = answers == targets
    if same.ndim == 1:
        return same.float()
    both = (same & (targets > 0)).flatten(1).sum(1)
    either = (answers > 0).flatten(1).sum(1) + (targets > 0).flatten(1).sum(1)
    return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0)


def log_probabilities(scores: Tensor, kind: ScoreKind, floor: float = 0.0) -> Tensor:
    """Log-probabilities of (N, K, *positions) scores, in nats, finite.

    With a floor, the least probability to answer: the others are scaled so that they sum to one again.
    """
    logs = F.log_softmax(scores, dim=1) if kind == "logits" else scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    return F.log_softmax(logs.clamp_min(math.log(floor)), dim=1) if floor else logs


def _cross_entropy(scores: Tensor, targets: Tensor, kind: ScoreKind) -> Tensor:
    """(N, *positions), in nats."""
    return -log_probabilities(scores, kind).gather(1, targets.unsqueeze(1)).squeeze(1)


def _probabilities(scores: Tensor, kind: ScoreKind) -> Tensor:
    return scores.softmax(1) if kind == "logits" else scores


def _foreground(targets: Tensor, classes: int) -> Tensor:
    """(N, K - 1, H, W): 1 where the target is the class; background, class 0, has no plane."""
    return F.one_hot(targets, classes).movedim(-1, 1)[:, 1:].float()


def _soft_dice(probabilities: Tensor, targets: Tensor) -> Tensor:
    """(N, K - 1) soft Dice of the classes that are not background, 1 where both are empty."""
    wanted = _foreground(targets, probabilities.shape[1]).flatten(2)
    found = probabilities[:, 1:].flatten(2)
    return (2 * (found * wanted).sum(2) + _SMOOTH) / (found.sum(2) + wanted.sum(2) + _SMOOTH)


def denoising_loss(sanitized: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error per pixel of (N, C, H, W) sanitized images against the clean ones: (N,)."""
    return (sanitized - clean).square().flatten(1).mean(1)


def inject_gradient(points: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient at the points (N, ...) is the given one, averaged over the batch.

    Back-propagated, it carries an estimated gradient into what lies before the black box (ZO-AE-DS, equation 7).
    """
    return (points * gradient.detach()).flatten(1).sum(1).mean()
