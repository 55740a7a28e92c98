"""Whether attacks can be believed: an attack that fails these says nothing about what it attacked.

Sources: Athalye, Carlini and Wagner, ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

Size = tuple[str, float]
"""Norm, and epsilon in units of [0,1]."""

SURE: Final = 128 / 255
"""A change of every pixel with which any image can be made any other's: here an attack that works has to succeed."""

_SLACK: Final = 0.02
"""By how much mean scores may differ before a check fails."""


def describe(size: Size) -> str:
    """A size in words, L-infinity ones in grey levels."""
    norm, epsilon = size
    return f"{norm} {255 * epsilon:g}/255" if norm == "linf" else f"{norm} {epsilon:g}"


def checks(insider: Mapping[Size, Mapping[str, float]], outsider: Mapping[Size, Mapping[str, float]]) -> Sequence[str]:
    """What is wrong with the attacks, or that nothing is: a line for each check of what was attacked.

    Args:
        insider: Mean scores by size and attack, with "worst" (of each image's least score) and "held" (share of images
            whose answer is then still right, or whose mask is not lost); empty if there is no insider.
        outsider: The same of the outsider.
    """
    found: list[str] = []

    def check(what: str, failures: Sequence[str]) -> None:
        found.append(f"check: {what}: " + ("holds" if not failures else "FAILS at " + "; ".join(failures)))

    def below(means: Mapping[Size, Mapping[str, float]], low: str, high: str) -> list[str]:
        """Sizes at which the attack `low` leaves less than `high` does, which should be at least as strong."""
        return [
            _told(size, one[low], one[high])
            for size, one in means.items()
            if low in one and high in one and one[low] < one[high] - _SLACK
        ]

    small = {size: one for size, one in insider.items() if size != ("linf", SURE)}
    if insider:
        check("many steps are not weaker than one", below(insider, "fgsm", "pgd"))
        check("twice the steps and another start change little", below(small, "pgd-twice", "pgd"))
        if any("pgd-transfer" in one for one in insider.values()):
            check("who sees no gradients of the defense is not better", below(insider, "pgd-transfer", "pgd"))
    if insider and outsider:
        both = {size: {"in": one["worst"], "out": outsider[size]["worst"]} for size, one in small.items()}
        check("who sees answers alone is not better than who sees all", below(both, "out", "in"))
    for name, means in (("insider", insider), ("outsider", outsider)):
        if means:
            check(f"larger changes are not less successful ({name})", list(_rising(means)))
    if insider:
        sure = insider["linf", SURE]["held"]
        failures = [_told(("linf", SURE), sure, 0.0)] if sure > _SLACK else []
        check("a change of half the range always succeeds", failures)
    return found


def _rising(means: Mapping[Size, Mapping[str, float]]) -> list[str]:
    rising = []
    for norm in ("linf", "l2"):
        for small, large in pairwise(sorted(size for size in means if size[0] == norm)):
            if means[large]["worst"] > means[small]["worst"] + _SLACK:
                rising.append(_told(large, means[large]["worst"], means[small]["worst"]))
    return rising


def _told(size: Size, left: float, right: float) -> str:
    return f"{describe(size)} ({100 * left:.1f} against {100 * right:.1f})"
