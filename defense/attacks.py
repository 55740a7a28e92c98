"""Gradient attacks of one signature, as thin adapters over foolbox.

`craft("pgd", model, images, labels, epsilon)` returns images of the same shape, inside the bounds [0,1]. All attacks
are untargeted and maximise (or, for DDN, use) a loss of the model's logits against the given labels: of a classifier
the cross-entropy, of a segmenter the mean cross-entropy of the pixels plus the soft Dice loss.

| name     | norm  | steps | step / epsilon | start  | source                                      |
|----------|-------|-------|----------------|--------|---------------------------------------------|
| `fgsm`   | L-inf | 1     | 1              | image  | Goodfellow et al., ICLR 2015                |
| `pgd`    | L-inf | 40    | 2.5 / steps    | random | Madry et al., ICLR 2018                     |
| `pgd-l2` | L2    | 40    | 2.5 / steps    | random | Madry et al., ICLR 2018                     |
| `segpgd` | L-inf | 40    | 2.5 / steps    | random | Gu et al., ECCV 2022: segmenters only       |
| `ddn`    | L2    | 100   | decoupled      | image  | Rony et al., CVPR 2019: minimum norm        |

To foolbox a segmenter is shown as a classifier of whole images: the mask holds, or it is lost. Its logits are such that
their gradient has the direction of the loss's, so that all of these attacks take the steps that they are defined by,
and such that the class tells whether the Dice of the answer is below `LOST`, which is what DDN looks for.

DDN is minimum-norm: it takes no epsilon (None) and returns the closest adversarial image it saw. foolbox's DDN does not
round the images to 256 levels (adv-lib's does so by default), so its norms are the smaller, unquantised ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.foolbox_parts import (
    Bounds,
    DDNAttack,
    L2ProjectedGradientDescentAttack,
    LinfFastGradientAttack,
    LinfProjectedGradientDescentAttack,
    PyTorchModel,
)
from defense.objectives import agreement, stability_loss

BOUNDS = Bounds(0.0, 1.0)

LOST = 0.5
"""Dice with the right mask below which an answer counts as lost: less is shared than is not."""

PGD_REACH = 2.5
"""Step size times steps, in epsilons: more than 2, so that PGD can cross the whole ball from any random start."""


@dataclass(frozen=True)
class Attack:
    """One line of the table of attacks.

    Attributes:
        norm: The norm that is bounded (or, for a minimum-norm attack, minimised).
        steps: Gradient steps when none are asked for.
        minimum_norm: Whether the attack looks for the smallest perturbation and takes no epsilon.
        build: Makes the foolbox attack for a number of steps.
        masks_only: Whether it is defined for segmenters only.
    """

    norm: Literal["linf", "l2"]
    steps: int
    minimum_norm: bool
    build: Callable[[int], Any]
    masks_only: bool = False


def _fgsm(steps: int) -> Any:
    if steps != 1:
        raise ValueError(f"fgsm has exactly one step, got {steps}")
    return LinfFastGradientAttack()


def _pgd(steps: int) -> Any:
    return LinfProjectedGradientDescentAttack(steps=steps, rel_stepsize=PGD_REACH / steps)


def _pgd_l2(steps: int) -> Any:
    return L2ProjectedGradientDescentAttack(steps=steps, rel_stepsize=PGD_REACH / steps)


def _ddn(steps: int) -> Any:
    return DDNAttack(steps=steps, init_epsilon=1.0, gamma=0.05)


ATTACKS: dict[str, Attack] = {
    "fgsm": Attack(norm="linf", steps=1, minimum_norm=False, build=_fgsm),
    "pgd": Attack(norm="linf", steps=40, minimum_norm=False, build=_pgd),
    "pgd-l2": Attack(norm="l2", steps=40, minimum_norm=False, build=_pgd_l2),
    "segpgd": Attack(norm="linf", steps=40, minimum_norm=False, build=_pgd, masks_only=True),
    "ddn": Attack(norm="l2", steps=100, minimum_norm=True, build=_ddn),
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
    """Crafts adversarial images.

    Args:
        name: A key of `ATTACKS`.
        model: Differentiable, in evaluation mode, (N,C,H,W) in [0,1] -> logits (N,K) or (N,K,H,W). It is left as it
            was: no gradient is stored in its parameters.
        images: (N,C,H,W) float32 in [0,1], on the model's device.
        labels: (N,) int64, the classes to get away from, or (N,H,W) the masks.
        epsilon: Radius in the attack's norm, in units of [0,1]; None for a minimum-norm attack, and only then.
        steps: Gradient steps; the table's when None.
        seed: Seed of the random starts. The global generator of torch is left as it was.
        batch: Images attacked together. With a seed it determines the random starts.

    Returns:
        (N,C,H,W) float32 in [0,1]. A minimum-norm attack returns an image unchanged where it found nothing.

    Raises:
        ValueError: A name that is unknown or not for such labels, an epsilon that is missing, superfluous or negative,
            images outside [0,1], or a model in training mode.
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
    if not (images.min() >= BOUNDS.lower and images.max() <= BOUNDS.upper):
        raise ValueError(f"images must lie in [{BOUNDS.lower:g}, {BOUNDS.upper:g}]")

    steps = attack.steps if steps is None else steps
    algorithm = attack.build(steps)
    arguments = {} if epsilon is None else {"epsilon": epsilon}
    crafted = []
    with undisturbed(model, images.device, seed):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            shown, classes = model, labels[part]
            if labels.ndim > 1:
                shown = _Holding(model, labels[part], steps if attack.masks_only else None).eval()
                classes = labels.new_zeros(len(classes))
            victim = PyTorchModel(shown, bounds=BOUNDS, device=images.device)
            found = algorithm.run(victim, images[part], classes, **arguments)
            crafted.append(found.detach().clamp(*BOUNDS))
    return torch.cat(crafted)


def minimum_norms(model: nn.Module, images: Tensor, adversarials: Tensor, labels: Tensor, batch: int = 128) -> Tensor:
    """Sizes of the perturbations that a minimum-norm attack found.

    Args:
        model: What was attacked, (N,C,H,W) -> logits (N,K) or (N,K,H,W).
        images: (N,C,H,W), the originals.
        adversarials: (N,C,H,W), what the attack returned.
        labels: (N,) int64, the classes to get away from, or (N,H,W) the masks.
        batch: Images in one forward pass.

    Returns:
        (N,) float32 L2 norms in units of [0,1]; 0 where the original was already misclassified or lost, inf where the
        attack found nothing.
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
    classifier's answer is wrong; then k is halved in between the last right and the first wrong answer. The final
    answer was wrong, so its norm is an upper bound on the smallest perturbation that fools this classifier. It is
    nothing more: the direction is an oblivious attacker's, and an adaptive attack may need far less.

    Args:
        classifier: (N,C,H,W) in [0,1] -> scores (N,K) or (N,K,H,W); it only answers, no gradients are asked for.
        images: (N,C,H,W) float32 in [0,1], the originals.
        adversarials: (N,C,H,W), made for another classifier.
        labels: (N,) or (N,H,W) int64, the right answers; a mask is wrong where it is lost.
        furthest: Largest factor k, at least 1.
        halvings: Bisections after the first wrong answer; the last interval is 2^-halvings of the first.

    Returns:
        (N,) float32 L2 norms of the clipped perturbation at which the answer is wrong; 0 where it is wrong without
        any, inf where it stays right up to `furthest` or where there is no perturbation to scale.
    """
    directions = adversarials - images

    def moved(chosen: Tensor, factors: Tensor) -> Tensor:
        return (images[chosen] + factors[chosen].view(-1, 1, 1, 1) * directions[chosen]).clamp(*BOUNDS)

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


class _Holding(nn.Module):
    """A segmenter as a classifier of images: their mask holds (0), or is lost (1).

    Args:
        model: (N,C,H,W) -> logits (N,K,H,W).
        masks: (N,H,W) int64, those of the images that it will be shown, always the same.
        weigh_over: T; the loss is that of SegPGD (Gu et al. 2022), whose weights change over T calls: of pixels that
            are wrong already lambda = (t - 1) / 2T, of the others 1 - lambda. None: cross-entropy and soft Dice.
    """

    def __init__(self, model: nn.Module, masks: Tensor, weigh_over: int | None) -> None:
        super().__init__()
        self._model, self._masks, self._weigh_over = model, masks, weigh_over
        self._calls = 0

    def forward(self, images: Tensor) -> Tensor:
        """(N,C,H,W) -> logits (N,2)."""
        logits = self._model(images)
        if self._weigh_over is None:
            loss = stability_loss(logits, self._masks, "logits")
        else:
            share = self._calls / (2 * self._weigh_over)  # foolbox asks for one gradient a step
            self._calls += 1
            weights = torch.where(logits.argmax(1) == self._masks, 1 - share, share)
            loss = (weights * F.cross_entropy(logits, self._masks, reduction="none")).flatten(1).mean(1)
        lost = torch.where(holds(logits.argmax(1), self._masks), -1.0, 1.0)
        score = lost + loss - loss.detach()  # the value tells the class, the gradient is the loss's
        return torch.stack([-score, score], dim=1)


def holds(answers: Tensor, labels: Tensor) -> Tensor:
    """(N,) whether answers are right: equal classes (N,), or masks (N,H,W) that are not lost."""
    return agreement(answers, labels) >= least_right(labels)


def least_right(labels: Tensor) -> float:
    """The agreement from which on an answer is right: 1 for classes (N,), `LOST` for masks (N,H,W)."""
    return 1.0 if labels.ndim == 1 else LOST


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Seeds torch's global generator, from which libraries draw, and keeps gradients out of the model's parameters.

    Both are put back; without gradients of the parameters the backward pass is also cheaper.
    """
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
