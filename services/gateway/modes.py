"""The modes of the gateway: what is computed for a request, on how many noisy copies, and what may be claimed.

    sanitize   one deterministic pass: the victim's scores for the sanitized image             1 query an image
    smooth     n noisy copies, each sanitized; the majority of the victim's answers,
               or an abstention where the lead may be chance (`Predict`)                       n queries an image
    certify    n0 copies choose the class, n others bound its probability: the class and the
               L2 radius within which it provably does not change (`Certify`, SegCertify)      n0 + n queries an image

Sources: Cohen, Rosenfeld and Kolter, ICML 2019, section 3.2; Fischer, Baader and Vechev, ICML 2021, algorithm 2.

The certificate is about the smoothed model: the class that sanitizer and victim most often give to noisy copies of an
image, at the model's size and with values in [0,1]. A request chooses the mode (`?mode=`) and a smaller n (`?n=`);
sigma, alpha, tau and the noise are the server's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import torch

from defense.smoothing import ABSTAIN, lower_bound, predict_counts
from services.gateway.config import GatewaySettings, Mode
from services.protocol.errors import InvalidInput

_LEADS: Final[dict[Mode, Callable[[int, float], bool]]] = {
    "smooth": lambda n, alpha: predict_counts(torch.tensor([n, 0]), alpha=alpha) != ABSTAIN,
    "certify": lambda n, alpha: lower_bound(n, n, alpha) > 0.5,
}
"""Whether n votes, all for one class, are an answer at this alpha."""


@dataclass(frozen=True)
class Plan:
    """What is computed for each image of a request.

    Attributes:
        mode: the mode.
        copies: noisy copies in each vote: (), (n) or (n0, n).
        sigma: standard deviation of the noise, in units of [0,1].
        alpha: probability that a claim is wrong.
        tau: minimum probability of a certified pixel's class.
    """

    mode: Mode
    copies: tuple[int, ...]
    sigma: float
    alpha: float
    tau: float

    def queries(self, images: int) -> int:
        """What so many images cost."""
        return images * (sum(self.copies) or 1)

    def terms(self, *, masks: bool = False) -> dict[str, Any]:
        """What an answer says of how it was found; `masks`: that it is about every pixel."""
        names = ("n",) if self.mode == "smooth" else ("n0", "n")
        told: dict[str, Any] = {"mode": self.mode}
        if self.copies:
            told |= {"sigma": self.sigma, "alpha": self.alpha, **dict(zip(names, self.copies, strict=True))}
        if masks and self.mode == "certify":
            told["tau"] = self.tau
        return told


class Modes:
    """What requests may choose from.

    Args:
        settings: the service's settings.
        sigma: the noise that the artifact was trained for; the settings' sigma takes precedence.

    Raises:
        InvalidInput: the settings allow a mode that could never answer.
    """

    def __init__(self, settings: GatewaySettings, sigma: float) -> None:
        self.allowed = settings.modes
        sigma = sigma if settings.sigma is None else settings.sigma
        copies: dict[Mode, tuple[int, ...]] = {
            "sanitize": (),
            "smooth": (settings.smooth_n,),
            "certify": (settings.certify_n0, settings.certify_n),
        }
        self._largest = {mode: Plan(mode, copies[mode], sigma, settings.alpha, settings.tau) for mode in settings.modes}
        self._fewest = {
            mode: next(n for n in count(1) if leads(n, settings.alpha))
            for mode, leads in _LEADS.items()
            if mode in self.allowed
        }
        for mode, fewest in self._fewest.items():
            if sigma == 0:
                raise InvalidInput(f"the artifact was trained without noise: mode {mode!r} needs --sigma")
            if copies[mode][-1] < fewest:
                raise InvalidInput(
                    f"--{mode}-n {copies[mode][-1]} can never answer anything at --alpha {settings.alpha}: "
                    f"it takes at least {fewest}"
                )

    def plan(self, mode: Mode | None, n: int | None) -> Plan:
        """What is computed for a request; None stands for the configured default.

        Raises:
            InvalidInput: the mode is not offered, or n is out of range.
        """
        mode = self.allowed[0] if mode is None else mode
        if mode not in self._largest:
            raise InvalidInput(f"mode {mode!r} is not offered here; choose from: {', '.join(self.allowed)}")
        plan = self._largest[mode]
        if n is None:
            return plan
        if not plan.copies:
            raise InvalidInput(f"n has no meaning in mode {mode!r}: it makes no noisy copies")
        if not self._fewest[mode] <= n <= plan.copies[-1]:
            raise InvalidInput(
                f"n must lie between {self._fewest[mode]} (fewer copies always abstain at alpha {plan.alpha}) and "
                f"{plan.copies[-1]} in mode {mode!r}, got {n}"
            )
        return Plan(mode, (*plan.copies[:-1], n), plan.sigma, plan.alpha, plan.tau)
