"""From votes to an answer or an abstention, and how far it holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from defense.segmentation_smoothing import certify_mask_counts, predict_mask_counts
from defense.smoothing import ABSTAIN, certify_counts, predict_counts
from services.gateway.modes import Plan
from services.upstream import Array


@dataclass(frozen=True)
class Verdict:
    """What is known of N images; P is () if they are classified, (H,W) if their pixels are.

    Attributes:
        labels: (N,*P) int64 classes, or `defense.smoothing.ABSTAIN`.
        votes: for each kind of copies of the plan, (N,K,*P) int64 counts.
        shares: (N,K,*P) float32: the last votes over n, estimates of the smoothed model's probabilities.
        radius: (N,) float64: certified L2 radius in units of [0,1], 0 if all labels are abstentions; None without a
            certificate.
    """

    labels: npt.NDArray[np.int64]
    votes: tuple[npt.NDArray[np.int64], ...]
    shares: Array
    radius: npt.NDArray[np.float64] | None


def judge(plan: Plan, counts: Sequence[Tensor]) -> Verdict:
    """The verdict from (N,K) or (N,K,H,W) int64 counts for each kind of copies of a smooth or certify plan.

    Each image's answer is wrong with probability at most alpha; a mask counts as wrong if any of its pixels is.
    """
    masks = counts[0].ndim == 4
    labels: list[Tensor] = []
    radii: list[float] = []
    if plan.mode == "smooth":
        for votes in counts[0]:
            labels.append(
                predict_mask_counts(votes, alpha=plan.alpha)
                if masks
                else torch.tensor(predict_counts(votes, alpha=plan.alpha))
            )
    else:
        for selection, estimation in zip(*counts, strict=True):
            if masks:
                of_mask = certify_mask_counts(selection, estimation, sigma=plan.sigma, alpha=plan.alpha, tau=plan.tau)
                labels.append(of_mask.labels)
                radii.append(of_mask.radius if bool((of_mask.labels != ABSTAIN).any()) else 0.0)
            else:
                certificate = certify_counts(selection, estimation, sigma=plan.sigma, alpha=plan.alpha)
                labels.append(torch.tensor(certificate.label))
                radii.append(certificate.radius)
    return Verdict(
        labels=torch.stack(labels).numpy(),
        votes=tuple(one.numpy() for one in counts),
        shares=(counts[-1] / plan.copies[-1]).float().numpy(),
        radius=np.array(radii) if radii else None,
    )
