"""Gradient attacks of one signature: `craft("pgd", model, images, labels, epsilon)`.

All are untargeted and raise a loss of the model's logits against the given labels: of a classifier the cross-entropy,
of a segmenter the mean cross-entropy of the pixels plus the soft Dice loss.

| name     | norm  | steps | step / epsilon | start  | source                                      |
|----------|-------|-------|----------------|--------|---------------------------------------------|
| `fgsm`   | L-inf | 1     | 1              | image  | Goodfellow et al., ICLR 2015                |
| `pgd`    | L-inf | 40    | 2.5 / steps    | random | Madry et al., ICLR 2018                     |
| `pgd-l2` | L2    | 40    | 2.5 / steps    | random | Madry et al., ICLR 2018                     |
| `segpgd` | L-inf | 40    | 2.5 / steps    | random | Gu et al., ECCV 2022: segmenters only       |
| `ddn`    | L2    | 100   | decoupled      | image  | Rony et al., CVPR 2019: minimum norm        |

DDN takes no epsilon (None) and returns the closest image it saw whose answer is wrong: another class, or a mask whose
Dice is below `LOST`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.gradient_attacks import Norm, Objective, ddn, fgsm, pgd
from defense.objectives import agreement, stability_loss

LOST: Final = 0.5
"""Dice with the right mask below which an answer counts as lost: less is shared than is not."""

PGD_REACH: Final = 2.5
"""Step size times steps, in epsilons: more than 2, so that PGD can cross the whole ball from any random start."""


@dataclass(frozen=True)
class Attack:
    """One line of the table of attacks; `norm` is bounded, or minimised by one of `minimum_norm`, without epsilon."""

    norm: Norm
    steps: int
    minimum_norm: bool = False
    masks_only: bool = False


ATTACKS: Final[dict[str, Attack]] = {
    "fgsm": Attack("linf", steps=1),
    "pgd": Attack("linf", steps=40),
    "pgd-l2": Attack("l2", steps=40),
    "segpgd": Attack("linf", steps=40, masks_only=True),
    "ddn": Attack("l2", steps=100, minimum_norm=True),
}


def attacks_on(labels: Tensor) -> list[str]:
    """Names of the attacks for classifiers, labels (N,), or segmenters, labels (N,H,W)."""
    return [name for name, attack in ATTACKS.items() if labels.ndim > 1 or not attack.masks_only]


def craft(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    *,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 128,
) -> Tensor:
    """Crafts adversarial images (N,C,H,W) float32 in [0,1]; a minimum-norm attack leaves those as they are that hold.

    The model, (N,C,H,W) -> logits (N,K) or (N,K,H,W), is differentiable and in evaluation mode; no gradient is left in
    it. `labels` are the classes (N,) or masks (N,H,W), int64, to get away from; `epsilon` is a radius in the attack's
    norm, in units of [0,1], None for a minimum-norm attack, and only then; `steps` are the table's when None. Seed and
    batch determine the random starts; the global generator of torch is left as it was.

    Raises:
        ValueError: An argument is not as above, or the attack is not for such labels.
    """
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}; there are {', '.join(attacks_on(labels))}")
    if name not in attacks_on(labels):
        raise ValueError(f"{name} attacks masks (N,H,W); the labels are of shape {tuple(labels.shape)}")
    attack = ATTACKS[name]
    if attack.minimum_norm != (epsilon is None):
        raise ValueError(f"{name} takes {'no' if attack.minimum_norm else 'an'} epsilon")
    if epsilon is not None and not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be finite and at least 0, got {epsilon}")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    if len(images) == 0:
        return images.clone()
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError("images must lie in [0, 1]")

    steps = attack.steps if steps is None else steps
    if name == "fgsm" and steps != 1:
        raise ValueError(f"fgsm has exactly one step, got {steps}")
    crafted = []
    with undisturbed(model, images.device, seed):
        for x, y in zip(images.detach().split(batch), labels.split(batch), strict=True):
            objective = _objective(model, y, steps if attack.masks_only else None)
            if epsilon is None:
                found = ddn(objective, x, steps=steps)
            elif name == "fgsm":
                found = fgsm(objective, x, epsilon)
            else:
                found = pgd(objective, x, epsilon, norm=attack.norm, alpha=PGD_REACH * epsilon / steps, steps=steps)
            crafted.append(found)
    return torch.cat(crafted)


def _objective(model: nn.Module, labels: Tensor, weigh_over: int | None) -> Objective:
    """The loss of the module's docstring and whether answers hold.

    With `weigh_over`, T, it is that of SegPGD over T steps: the cross-entropy of a pixel weighs lambda = t / 2T where
    the answer is wrong already, t from 0, and 1 - lambda elsewhere.
    """

    def objective(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        logits = model(x)
        answers = logits.argmax(1)
        if weigh_over is not None:
            share = t / (2 * weigh_over)
            weights = torch.where(answers == labels, 1 - share, share)
            loss = (weights * F.cross_entropy(logits, labels, reduction="none")).flatten(1).mean(1)
        elif labels.ndim > 1:
            loss = stability_loss(logits, labels, "logits")
        else:
            loss = F.cross_entropy(logits, labels, reduction="none")
        return loss, holds(answers, labels)

    return objective


def minimum_norms(model: nn.Module, images: Tensor, adversarials: Tensor, labels: Tensor, batch: int = 128) -> Tensor:
    """L2 norms (N,), in units of [0,1], of the perturbations that a minimum-norm attack on a model found.

    0 where the original was answered wrongly, or lost, already; inf where the attack found nothing.
    """
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(dim=1) for part in torch.split(adversarials, batch)])
    norms: Tensor = torch.linalg.vector_norm((adversarials - images).flatten(1), dim=1)
    return norms.masked_fill(holds(answers, labels), float("inf"))


def scaled_norms(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    adversarials: Tensor,
    labels: Tensor,
    *,
    furthest: float = 64.0,
    halvings: int = 5,
) -> Tensor:
    """How far perturbations made for one classifier must be scaled until another one errs too.

    Each image is moved to clip(image + k * (adversarial - image)) for k = 1, 2, 4, ... up to `furthest`, until the
    answer is wrong (a mask: lost); then k is bisected `halvings` times. This is an upper bound on the smallest
    perturbation that fools the classifier, (N,C,H,W) in [0,1] -> scores (N,K) or (N,K,H,W): an adaptive attacker may
    need far less.

    Returned are (N,) L2 norms of the clipped perturbations; 0 where the answer is wrong without any, inf where it stays
    right, or where there is no perturbation to scale.
    """
    directions = adversarials - images

    def moved(chosen: Tensor, factors: Tensor) -> Tensor:
        return (images[chosen] + factors[chosen].view(-1, 1, 1, 1) * directions[chosen]).clamp(0, 1)

    def errs(chosen: Tensor, factors: Tensor) -> Tensor:
        if len(chosen) == 0:
            return torch.zeros(0, dtype=torch.bool)
        return ~holds(classifier(moved(chosen, factors)).argmax(dim=1), labels[chosen])

    everyone = torch.arange(len(images))
    right, wrong = torch.zeros(len(images)), torch.full((len(images),), float("inf"))
    wrong[errs(everyone, right)] = 0.0
    factor = 1.0
    while factor <= furthest:
        chosen = (wrong.isinf() & directions.flatten(1).any(dim=1)).nonzero().squeeze(1)
        hit = errs(chosen, torch.full_like(wrong, factor))
        wrong[chosen[hit]] = factor
        right[chosen[~hit]] = factor
        factor *= 2
    chosen = (wrong.isfinite() & (wrong > 0)).nonzero().squeeze(1)
    for _ in range(halvings):
        middle = (right + wrong) / 2
        hit = errs(chosen, middle)
        wrong[chosen[hit]] = middle[chosen[hit]]
        right[chosen[~hit]] = middle[chosen[~hit]]
    fooling = moved(everyone, wrong.masked_fill(wrong.isinf(), 0.0))
    norms: Tensor = torch.linalg.vector_norm((fooling - images).flatten(1), dim=1)
    return norms.masked_fill(wrong.isinf(), float("inf"))


def holds(answers: Tensor, labels: Tensor) -> Tensor:
    """(N,) whether answers are right: equal classes (N,), or masks (N,H,W) that are not lost."""
    return agreement(answers, labels) >= least_right(labels)


def least_right(labels: Tensor) -> float:
    """The agreement from which on an answer is right: 1 for classes (N,), `LOST` for masks (N,H,W)."""
    return 1.0 if labels.ndim == 1 else LOST


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Seeds torch's global generator and keeps gradients out of the model's parameters; both are put back."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
