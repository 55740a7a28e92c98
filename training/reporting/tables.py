"""The tables of the report, in HTML."""

import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum

from defense.artifact import Manifest
from training.attack.ensemble import CORRUPTION, OUTSIDER, WORST_CASE
from training.measure.results import NO_DEFENSE, Row
from training.measure.scoring import TITLES

MISSING = "<p>Not measured.</p>"


def table(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the first cell of each line names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{cell}</td>" for cell in line[1:])}</tr>' for line in lines
    )
    return f'<div class="wide"><table><caption>{html.escape(caption)}</caption><tr>{top}</tr>{body}</table></div>'


def ladder(rows: Sequence[Row], metric: str) -> str:
    """The scores on clean images, under oblivious attacks, and in the worst cases; nothing where there are none."""
    return _scores(rows, metric, f"{TITLES[metric]}, in %", {_Rung.CLEAN, _Rung.OBLIVIOUS, _Rung.WORST})


def attacks(rows: Sequence[Row], metric: str) -> str:
    """The scores under each attack of those worst cases; nothing where there are none."""
    return _scores(rows, metric, f"{TITLES[metric]} under each of these attacks, in %", {_Rung.OUTSIDER, _Rung.INSIDER})


def corruptions(rows: Sequence[Row], metric: str) -> str:
    """The scores on images that were changed without intent, at rising severities; nothing where there are none."""
    shown = [row for row in rows if row.metric == metric and _rung(row.attack)[0] is _Rung.CORRUPTION]
    if not shown:
        return ""
    names = defenses(shown)
    lines = []
    for attack in sorted({row.attack for row in shown}):
        line = [html.escape(_rung(attack)[1])]
        for name in names:
            found = sorted(
                (row.epsilon or 0, row.value or 0) for row in shown if (row.attack, row.defense) == (attack, name)
            )
            line.append(" / ".join(f"{100 * value:.1f}" for _, value in found) or "-")
        lines.append(line)
    caption = f"{TITLES[metric]} on images changed without intent, at severities 1 / 2 / 3, in %"
    return table(caption, ["change", *map(html.escape, names)], lines)


def _scores(rows: Sequence[Row], metric: str, caption: str, rungs: Collection["_Rung"]) -> str:
    """A line an attack and size, by who attacks; a column a defense."""
    shown = [row for row in rows if row.metric == metric and row.attack != "certificate"]
    shown = [row for row in shown if _rung(row.attack)[0] in rungs]
    if not shown:
        return ""
    columns = sorted({_column(row) for row in shown}, key=lambda one: (_rung(one[0])[0].value, *one))
    cells = {(row.defense, _column(row)): row for row in shown}
    names = defenses(shown)
    lines = []
    for attack, norm, epsilon in columns:
        line = [f"{html.escape(_rung(attack)[1])} <small>{_size(norm, epsilon)}</small>"]
        lines.append([*line, *(_cell(cells.get((defense, (attack, norm, epsilon)))) for defense in names)])
    return table(caption, ["attack", *map(html.escape, names)], lines)


def smallest(rows: Sequence[Row]) -> str:
    """The median L2 norms of the smallest changes that attacks found, a column a defense; nothing where none was."""
    shown = [row for row in rows if row.metric.startswith("median_")]
    if not shown:
        return ""
    names = defenses(shown)
    cells = {(row.defense, row.attack, row.metric): row for row in shown}
    lines = []
    for attack, metric in sorted(
        {(row.attack, row.metric) for row in shown}, key=lambda one: (_rung(one[0])[0].value, *one)
    ):
        how = " <small>made for the bare model, scaled up</small>" if metric.endswith("scaled") else ""
        found = [cells.get((name, attack, metric)) for name in names]
        line = ["-" if row is None else "beyond" if row.value is None else f"{row.value:.3f}" for row in found]
        lines.append([html.escape(_rung(attack)[1]) + how, *line])
    return table("Smallest change that was found, median L2 norm", ["attack", *map(html.escape, names)], lines)


def ledger(artifacts: Mapping[str, Manifest]) -> Iterator[str]:
    """Victim queries by purpose."""
    purposes = sorted({purpose for one in artifacts.values() for purpose in one.queries})
    if not purposes:
        return
    lines = []
    for name, manifest in artifacts.items():
        counts = [manifest.queries.get(purpose, 0) for purpose in purposes]
        lines.append([html.escape(name), *(f"{count:,}" for count in [*counts, manifest.queries_spent])])
    head = ["defense", *map(html.escape, purposes), "all"]
    yield table("Victim queries by purpose, in images", head, lines)


def defenses(rows: Sequence[Row]) -> list[str]:
    """Their names, the bare model first."""
    return sorted({row.defense for row in rows}, key=lambda name: (name != NO_DEFENSE, name))


class _Rung(Enum):
    """Kinds of attackers, by what they know."""

    CLEAN = 0
    CORRUPTION = 1
    OBLIVIOUS = 2
    OUTSIDER = 3
    INSIDER = 4
    WORST = 5


def _rung(attack: str) -> tuple[_Rung, str]:
    """The rung of an attack on the threat ladder, and its name there."""
    who, _, how = attack.partition("-")
    known = {
        "none": (_Rung.CLEAN, "clean"),
        OUTSIDER: (_Rung.WORST, "outsider, worst case"),
        WORST_CASE: (_Rung.WORST, "all that were tried, worst case"),
    }
    rungs = {CORRUPTION: _Rung.CORRUPTION, OUTSIDER: _Rung.OUTSIDER, WORST_CASE: _Rung.INSIDER}
    if attack in known:
        return known[attack]
    if who in rungs:
        rung = rungs[who]
        return rung, how if rung is _Rung.CORRUPTION else f"{rung.name.lower()}: {how}"
    return _Rung.OBLIVIOUS, f"oblivious: {attack}"


def _column(row: Row) -> tuple[str, str, float]:
    return row.attack, row.norm, -1.0 if row.epsilon is None else row.epsilon


def _size(norm: str, epsilon: float) -> str:
    if epsilon < 0:
        return "" if norm == "none" else f"{norm}, smallest"
    return f"{norm} {255 * epsilon:.3g}/255" if norm == "linf" else f"{norm} {epsilon:g}"


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-"
    if row.low is None or row.high is None:
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} <small>{100 * row.low:.1f} to {100 * row.high:.1f}</small>"
