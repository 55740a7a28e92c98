"""All attacks of a red team at all sizes: rows, table, and the checks of the attacks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from training.attack.checks import SURE, Size, checks, describe
from training.attack.insider import Insider
from training.attack.outsider import Outsider
from training.measure.results import Row, align, write_rows

logger = logging.getLogger(__name__)

_Key = tuple[str, str, float | None]
"""Attack, norm and epsilon of a row."""

WORST_CASE: Final = "adaptive"
"""The attack, in the results, of which each image's score is the least of all of them."""

OUTSIDER: Final = "outsider"
"""The same of the attacks that see answers alone."""

CORRUPTION: Final = "corruption"
"""With the kind behind it, the `attack` of corrupted images."""

_COLUMNS: Final = ("fgsm", "pgd", "pgd-twice", "pgd-bpda", "pgd-transfer", "apgd", "square", "hopskipjump", "student")


class AttackEnsemble:
    """All attacks of insider and outsider at all sizes; rows are written as they come.

    Args:
        insider: Knows the weights.
        outsider: Sees answers only.
        row: Makes a row of `training.measure.results.measured_row`'s remaining arguments.
        metric: Of the scores.
        least_right: The score from which on an answer is right.
        results: Where rows go.
    """

    def __init__(
        self,
        insider: Insider | None,
        outsider: Outsider | None,
        row: Callable[..., Row],
        metric: str,
        least_right: float,
        results: Path,
    ) -> None:
        self._insider, self._outsider, self._results = insider, outsider, results
        self._row, self._metric, self._least_right = row, metric, least_right

    def run(self, linf: Sequence[float], l2: Sequence[float]) -> None:
        """Attacks with L-inf and L2 sizes in units of [0,1], writes rows, and prints the table and the checks."""
        parties = {party: who.clean() for party, who in self._parties().items()}
        clean = torch.stack(list(parties.values())).amin(0)
        self._write({("none", "none", None): clean})
        print(f"clean {100 * float(clean.mean()):.1f}")
        means: dict[str, dict[Size, dict[str, float]]] = {party: {} for party in parties}
        worst: dict[Size, float] = {}
        sizes = [("linf", size) for size in sorted({*linf, SURE})] + [("l2", size) for size in sorted(set(l2))]
        for size in sizes:
            least = [clean]
            written: dict[_Key, Tensor] = {}
            for party, who in self._parties().items():
                scored = who.attacked(*size)
                party_worst = torch.stack([parties[party], *scored.values()]).amin(0)
                least.append(party_worst)
                means[party][size] = {attack: float(values.mean()) for attack, values in scored.items()}
                means[party][size]["worst"] = float(party_worst.mean())
                means[party][size]["held"] = float((party_worst >= self._least_right).double().mean())
                prefix = WORST_CASE if party == "insider" else OUTSIDER
                written |= {(f"{prefix}-{attack}", *size): values for attack, values in scored.items()}
                if party == "outsider":
                    written[OUTSIDER, *size] = party_worst
            everything = torch.stack(least).amin(0)
            worst[size] = float(everything.mean())
            if self._insider is not None:
                written[WORST_CASE, *size] = everything
            self._write(written)
            logger.info("%s: worst case %s %.1f%%", describe(size), self._metric, 100 * worst[size])
        self._smallest()
        print(_table(means, worst))
        self._corrupted()
        for told in checks(means.get("insider", {}), means.get("outsider", {})):
            print(told)
        if self._outsider is not None:
            spent = self._outsider.spent
            print(f"the outsider's queries: {sum(spent.values()):,} {spent}")
            if self._outsider.refused is not None:
                print(f"the gateway refused: {self._outsider.refused}; what was not attacked counts as held")

    def _parties(self) -> Mapping[str, Insider | Outsider]:
        both = {"insider": self._insider, "outsider": self._outsider}
        return {name: who for name, who in both.items() if who is not None}

    def _smallest(self) -> None:
        for attack, who in (("adaptive-ddn", self._insider), ("outsider-hopskipjump", self._outsider)):
            norms = None if who is None else who.smallest()
            if norms is not None and len(norms):
                self._write({(attack, "l2", None): norms}, metric="median_l2")
                print(f"{attack}: median L2 norm {norms.double().quantile(0.5, interpolation='nearest').item():.3f}")

    def _corrupted(self) -> None:
        found = {} if self._outsider is None else self._outsider.corrupted()
        if not found:
            return
        written: dict[_Key, Tensor] = {}
        for (kind, severity), one in found.items():
            written[f"{CORRUPTION}-{kind}", "severity", float(severity)] = one
        self._write(written)
        lines = [["corruption", "1", "2", "3"]]
        for kind in dict.fromkeys(kind for kind, _ in found):
            cells = [f"{100 * float(one.mean()):.1f}" for (name, _), one in found.items() if name == kind]
            lines.append([kind, *cells, *["-"] * (3 - len(cells))])
        print(align(lines))

    def _write(self, found: Mapping[_Key, Tensor], metric: str | None = None) -> None:
        rows = [
            self._row(values.double().numpy(), attack=attack, norm=norm, epsilon=epsilon, metric=metric or self._metric)
            for (attack, norm, epsilon), values in found.items()
        ]
        write_rows(self._results, rows)


def _table(means: Mapping[str, Mapping[Size, Mapping[str, float]]], worst: Mapping[Size, float]) -> str:
    merged = {size: {attack: mean for one in means.values() for attack, mean in one[size].items()} for size in worst}
    columns = [attack for attack in _COLUMNS if any(attack in one for one in merged.values())]
    lines = [["size", *columns, "worst"]]
    for size, one in merged.items():
        cells = [f"{100 * one[attack]:.1f}" if attack in one else "-" for attack in columns]
        lines.append([describe(size), *cells, f"{100 * worst[size]:.1f}"])
    return align(lines)
