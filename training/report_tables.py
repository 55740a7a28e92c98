"""The tables of the report, in HTML."""

import html
from collections.abc import Iterator, Mapping, Sequence

from defense.artifact import Manifest
from training.results import NO_DEFENCE, Row
from training.scoring import TITLES

MISSING = "<p>Not measured.</p>"


def table(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the first cell of each line names it."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{cell}</td>" for cell in line[1:])}</tr>' for line in lines
    )
    return f'<div class="wide"><table><caption>{html.escape(caption)}</caption><tr>{top}</tr>{body}</table></div>'


def ladder(rows: Sequence[Row], metric: str) -> str:
    """The scores under every attack that was measured, a column a defence; nothing where there are none."""
    shown = [row for row in rows if row.metric == metric and row.attack != "certificate"]
    if not shown:
        return ""
    columns = sorted({_column(row) for row in shown}, key=lambda one: (one[0] != "none", one))
    cells = {(row.defence, _column(row)): row for row in shown}
    names = defences(shown)
    lines = []
    for attack, norm, epsilon in columns:
        name = "clean" if attack == "none" else attack
        line = [f"{html.escape(name)} <small>{_size(norm, epsilon)}</small>"]
        lines.append([*line, *(_cell(cells.get((defence, (attack, norm, epsilon)))) for defence in names)])
    head = ["attack", *map(html.escape, names)]
    return table(f"{TITLES[metric]}, in %", head, lines)


def ledger(artifacts: Mapping[str, Manifest]) -> Iterator[str]:
    """Victim queries by purpose."""
    purposes = sorted({purpose for one in artifacts.values() for purpose in one.queries})
    if not purposes:
        return
    lines = []
    for name, manifest in artifacts.items():
        counts = [manifest.queries.get(purpose, 0) for purpose in purposes]
        lines.append([html.escape(name), *(f"{count:,}" for count in [*counts, manifest.queries_spent])])
    head = ["defence", *map(html.escape, purposes), "all"]
    yield table("Victim queries by purpose, in images", head, lines)


def defences(rows: Sequence[Row]) -> list[str]:
    """Their names, the bare model first."""
    return sorted({row.defence for row in rows}, key=lambda name: (name != NO_DEFENCE, name))


def _column(row: Row) -> tuple[str, str, float]:
    return row.attack, row.norm, -1.0 if row.epsilon is None else row.epsilon


def _size(norm: str, epsilon: float) -> str:
    if epsilon < 0:
        return "" if norm == "none" else f"{norm}, smallest"
    return f"{norm} {255 * epsilon:g}/255" if norm == "linf" else f"{norm} {epsilon:g}"


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-"
    if row.low is None or row.high is None:
        return f"{100 * row.value:.1f}"
    return f"{100 * row.value:.1f} <small>{100 * row.low:.1f} to {100 * row.high:.1f}</small>"
