"""The loss of `zo_fit` as its estimators see it: of points at the border of the black box."""

import torch
from torch import Tensor

from defense.estimators import Loss
from defense.objectives import located_loss, stability_loss
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim
from training.fit.student import Student

_CHUNK = 2048  # images decoded and sent at once: bounds the images in memory, not the points they are decoded from


def loss_behind_border(
    z: Tensor, targets: Tensor, sanitizer: Sanitizer, victim: MeteredVictim, student: Student | None
) -> Loss:
    """The stability loss around points at the border, where what follows are decoder and victim.

    Args:
        z: (N, *shape) points.
        targets: (N,) or (N, H, W) the victim's classes for the clean images.
        sanitizer: Decodes the points.
        victim: The metered black box, probed already.
        student: Learns from what is asked, and knows a loss of its own; None: there is no surrogate.
    """
    kind = victim.kind
    assert kind is not None  # probed

    def answers(points: Tensor, owners: Tensor) -> Tensor:
        seen, answered = [], []
        for chunk in points.split(_CHUNK):
            images = sanitizer.decode(chunk)
            answered.append(victim.query(images, "training"))
            if student is not None:
                seen.append(images)
        scores = torch.cat(answered)
        if student is not None:
            student.watch(z, points, owners, torch.cat(seen), scores, kind)
        return scores

    def black_box(points: Tensor, owners: Tensor) -> Tensor:
        return stability_loss(answers(points, owners), targets[owners], kind)

    def located(points: Tensor, owners: Tensor) -> Tensor:
        scores = answers(points, owners)
        return located_loss(scores, targets[owners], kind, around=scores[owners])

    def surrogate(points: Tensor) -> Tensor:
        assert student is not None
        return student.surrogate.loss(sanitizer.decode(points), targets[: len(points)])

    known = None if student is None else surrogate
    return Loss(black_box, known, located if targets.ndim > 1 else None)
