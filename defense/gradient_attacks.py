"""FGSM, PGD and DDN, as pure functions of an objective, with the papers' symbols.

An objective takes images (N,C,H,W) and the step t, from 0, and returns losses (N,), which the attacks raise, and
whether each answer still holds, (N,) bool. Images stay in [0,1]; random numbers are those of torch's global generator.
"""

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

Objective = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Norm = Literal["linf", "l2"]

_TINY: Final = 1e-12  # no division by zero


def fgsm(objective: Objective, x: Tensor, epsilon: float) -> Tensor:
    """The fast gradient sign method (Goodfellow et al., ICLR 2015): clip(x + epsilon sign(grad L(x)))."""
    gradient, _ = _gradient(objective, x, 0)
    return (x + epsilon * gradient.sign()).clamp(0, 1)


def pgd(objective: Objective, x: Tensor, epsilon: float, *, norm: Norm, alpha: float, steps: int) -> Tensor:
    """Projected gradient ascent from a random start (Madry et al., ICLR 2018); returns the last image.

    x_0 is uniform in the ball B of radius epsilon about x (N,C,H,W), and x_{t+1} = clip(Pi_B(x_t + alpha g_t)), where
    g_t is the sign of the gradient in L-inf, and the gradient's unit vector in L2.
    """
    x_t = (x + _in_ball(x, epsilon, norm)).clamp(0, 1)
    for t in range(steps):
        gradient, _ = _gradient(objective, x_t, t)
        if norm == "linf":
            delta = (x_t + alpha * gradient.sign() - x).clamp(-epsilon, epsilon)
        else:
            delta = x_t + alpha * gradient / l2_norms(gradient).clamp_min(_TINY) - x
            delta = delta * (epsilon / l2_norms(delta).clamp_min(_TINY)).clamp_max(1)
        x_t = (x + delta).clamp(0, 1)
    return x_t


def ddn(objective: Objective, x: Tensor, *, steps: int, epsilon: float = 1.0, gamma: float = 0.05) -> Tensor:
    """The decoupled direction and norm attack (Rony et al., CVPR 2019), which looks for the smallest L2 perturbation.

    Every step goes along the unit gradient, its size falling from 1 to 0.01 by a cosine, and is then put on a sphere
    about x (N,C,H,W), of radius epsilon at first, which shrinks by 1 - gamma while the answer is wrong and grows by
    1 + gamma while it holds. Unlike in the paper, images are not rounded to 256 levels: norms are the smaller ones.

    Returns:
        (N,C,H,W), the closest image whose answer was wrong; x where there was none.
    """
    furthest = l2_norms(torch.maximum(x, 1 - x))
    best, best_norm = torch.zeros_like(x), furthest
    delta, radius = torch.zeros_like(x), torch.full_like(furthest, epsilon)
    for t in range(steps):
        gradient, held = _gradient(objective, x + delta, t)
        wrong, norm = ~held.view_as(radius), l2_norms(delta)
        closer = wrong & (norm <= best_norm)
        best, best_norm = torch.where(closer, delta, best), torch.where(closer, norm, best_norm)
        flat = l2_norms(gradient) == 0
        if flat.any():
            gradient = torch.where(flat, torch.randn_like(gradient), gradient)
        alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * t / steps)) / 2
        delta = delta + alpha * gradient / l2_norms(gradient).clamp_min(_TINY)
        radius = torch.minimum(radius * torch.where(wrong, 1 - gamma, 1 + gamma), furthest)
        delta = delta * (radius / l2_norms(delta).clamp_min(_TINY))
        delta = (x + delta).clamp(0, 1) - x
    return x + best


def _gradient(objective: Objective, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The gradient of each image's own loss, (N,C,H,W), and whether answers hold, (N,)."""
    x = x.detach().requires_grad_(True)
    loss, held = objective(x, t)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return gradient, held


def l2_norms(images: Tensor) -> Tensor:
    """(N,1,1,1) L2 norms."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
    return norms


def _in_ball(x: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """Uniform in the ball of a radius, of the shape of x."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-epsilon, epsilon)
    # The first n of n + 2 coordinates of a point on the sphere are uniform in the ball (Voelker et al., 2017).
    point = torch.randn(len(x), x[0].numel() + 2, dtype=x.dtype, device=x.device)
    inside: Tensor = point[:, :-2] / torch.linalg.vector_norm(point, dim=1, keepdim=True)
    return epsilon * inside.view_as(x)
