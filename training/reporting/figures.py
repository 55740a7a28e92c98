"""The figures of the report: SVG within the HTML, in colours that colour-blind people tell apart."""

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("Agg")  # files only; there may be no screen

from matplotlib import pyplot as plt

from training.attack.checks import SURE
from training.attack.ensemble import OUTSIDER, WORST_CASE
from training.comparison.plots import COLOURS, MARKERS
from training.measure.results import Row
from training.reporting.tables import MISSING, defenses

_ATTACKS: Final = (
    ("linf", "pgd", 255, "L-infinity size of the attack, in 1/255"),
    ("l2", "pgd-l2", 1, "L2 size of the attack"),
)
_HOW: Final = {WORST_CASE: "all attacks, worst case", OUTSIDER: "outsider, worst case"}
Point = tuple[float, float]


def against_size(rows: Sequence[Row], metric: str) -> Iterator[str]:
    """Scores against epsilon: PGD made for the bare model, the worst case of an outsider, and that of all attacks."""
    scores = [row for row in rows if row.metric == metric]
    clean = {row.defense: [(0.0, row.value or 0.0)] for row in scores if row.attack == "none"}
    drawn = False
    for norm, oblivious, scale, unit in _ATTACKS:
        lines: list[tuple[str, int, str, list[Point]]] = []
        for number, defense in enumerate(defenses(scores)):
            for attack, style in ((oblivious, "-"), (OUTSIDER, ":"), (WORST_CASE, "--")):
                wanted = (defense, norm, attack)
                found = [row for row in scores if (row.defense, row.norm, row.attack) == wanted and row.epsilon]
                found = [row for row in found if norm != "linf" or (row.epsilon or 0) < SURE]  # a check, no result
                points = sorted((scale * (row.epsilon or 0), row.value or 0) for row in found)
                how = _HOW.get(attack, f"oblivious {attack}")
                if points:
                    lines.append((f"{defense}, {how}", number, style, [*clean.get(defense, []), *points]))
        if lines:
            drawn = True
            yield _figure(lines, unit, f"{metric}, %", f"{metric} against the size of the attack, {norm}")
    if not drawn:
        yield MISSING


def certified(rows: Sequence[Row], metric: str) -> str:
    """Certified scores against the radius."""
    shown = [row for row in rows if row.metric == f"certified_{metric}" and row.epsilon is not None]
    if not shown:
        return f"{MISSING}<p><code>python -m training.certify</code> measures it.</p>"
    lines = []
    for number, defense in enumerate(defenses(shown)):
        points = sorted((row.epsilon or 0, row.value or 0) for row in shown if row.defense == defense)
        lines.append((defense, number, "-", points))
    return _figure(lines, "certified L2 radius", f"certified {metric}, %", f"certified {metric} against the radius")


def learning(folder: Path, names: Iterable[str]) -> str:
    """Agreement with the model's own clean answers, as learning went on."""
    lines = []
    for number, name in enumerate(names):
        path = folder / name / "history.json"
        if path.exists():
            history = json.loads(path.read_bytes())
            lines.append((name, number, "-", [(entry["queries"], entry["agreement"]) for entry in history]))
    if not lines:
        return MISSING
    what = "agreement with the model's clean answers on noisy validation images, %"
    return _figure(lines, "victim queries spent", "agreement, %", what)


def image(data: bytes, media: str, what: str) -> str:
    """An image file of a media type, embedded in HTML; `what` is both its alternative text and its caption."""
    said, coded = html.escape(what), base64.b64encode(data).decode()
    return f'<figure><img src="data:{media};base64,{coded}" alt="{said}"><figcaption>{said}</figcaption></figure>'


def _figure(lines: Sequence[tuple[str, int, str, list[Point]]], x: str, y: str, what: str) -> str:
    """Lines of (name, number of the colour, style, points with shares as y)."""
    with mpl.rc_context({"svg.hashsalt": "report", "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        for name, number, style, points in lines:
            axes.plot(
                [place for place, _ in points],
                [100 * share for _, share in points],
                style,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                label=name,
            )
        axes.set(xlabel=x, ylabel=y, ylim=(0, 100))
        figure.legend(loc="outside right center", fontsize=8.5, handlelength=3.2)  # "best" is slow, and warns of it
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    return image(buffer.getvalue(), "image/svg+xml", what)
