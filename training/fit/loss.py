"""The loss of `zo_fit` as its estimators see it: of points at the border of the black box."""

import torch
from torch import Tensor

from defense.estimators import Loss, Points
from defense.objectives import located_loss, stability_loss
from defense.sanitizer import Sanitizer
from defense.surrogates import Surrogate
from defense.victims import MeteredVictim

_CHUNK = 2048  # images decoded and sent at once: bounds the images in memory, not the points they are decoded from


def loss_behind_border(
    targets: Tensor, sanitizer: Sanitizer, victim: MeteredVictim, surrogate: Surrogate | None
) -> Loss:
    """The stability loss of points at the border, which pass through the sanitizer's decoder and the probed victim.

    `targets` are the victim's classes for the clean images, (N,) or (N, H, W). A surrogate learns from the answers at
    the centers, and adds a loss that needs no query.
    """
    kind = victim.kind
    assert kind is not None  # probed

    def answers(points: Points) -> Tensor:
        seen, answered = [], []
        for chunk in points.z.split(_CHUNK):
            images = sanitizer.decode(chunk)
            answered.append(victim.query(images, "training"))
            if surrogate is not None:
                seen.append(images)
        scores = torch.cat(answered)
        if surrogate is not None:
            surrogate.observe(torch.cat(seen)[points.centers], scores[points.centers], kind)
        return scores

    def black_box(points: Points) -> Tensor:
        return stability_loss(answers(points), targets[points.owners], kind)

    def located(points: Points) -> Tensor:
        scores = answers(points)
        around = scores[points.centers][points.owners]
        return located_loss(scores, targets[points.owners], kind, around)

    def known(z: Tensor) -> Tensor:
        assert surrogate is not None
        return surrogate.loss(sanitizer.decode(z), targets[: len(z)])

    return Loss(black_box, None if surrogate is None else known, located if targets.ndim > 1 else None)
