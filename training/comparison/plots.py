"""The figures of a comparison, in the color-blind safe palette of Okabe and Ito, then by marker and line style."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")  # files only; there may be no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from training.comparison.methods import METHODS
from training.comparison.runs import Array, Group
from training.measure.intervals import nested_interval

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS: Final = "osD^vPXh"
_DPI: Final = 150
_GRID: Final = 200  # radii at which a curve is drawn
_SPREAD: Final = 0.14  # of the largest radius: how far apart the intervals at one radius are drawn, all in all
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.2,
}


def plot_certified(
    groups: Sequence[Group], radii: Sequence[float], reach: float, title: str, metric: str, path: Path
) -> None:
    """Draws the certified score against the L2 radius up to `reach`, each method at its largest budget.

    The curves have intervals at `radii`.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
        shown = _largest_budgets([group for group in groups if group.radii is not None])
        for place, group in enumerate(shown):
            grid = [reach * step / _GRID for step in range(_GRID + 1)]
            axes.plot(grid, [100 * float(_hits(group, radius).mean()) for radius in grid], **_looks(group))
            for radius in (radius for radius in radii if radius <= reach):
                value, low, high = _percent(group, radius)
                # Beside each other, or the intervals of many methods at one radius hide each other.
                step = min(0.012, _SPREAD / len(shown)) * reach
                beside = radius + (place - (len(shown) - 1) / 2) * step
                _bar(axes, beside, value, low, high, group)
        axes.set(
            xlabel="L2 radius (pixel values in [0, 1])", ylabel=f"certified {metric}, %", ylim=(0, 100), title=title
        )
        _legend(figure, shown, budget=True)
        _save(path)


def plot_queries(
    groups: Sequence[Group], radii: Sequence[float], out: Path, title: str, metric: str, path: Path
) -> None:
    """Draws the score against victim queries, in training (histories in `out`) and certified, a picture a radius.

    Methods without queries, and white boxes, are horizontal lines.
    """
    with mpl.rc_context(_STYLE):
        width = 1 + len(radii)
        figure, panels = plt.subplots(1, width, figsize=(4.2 * width + 2.2, 4.6), layout="constrained", squeeze=False)
        training, *certified = panels[0]
        learned = [group for group in groups if group.run.budget]
        across = _largest_budgets([group for group in groups if group.radii is not None and not group.run.budget])
        for group in _largest_budgets(learned):
            for record in group.records:
                spent, agreement = _history(out / record.run.place / "history.json")
                training.step(spent, agreement, where="post", alpha=0.8, **_looks(group))
        training.set(
            title="while learning", xlabel="victim queries spent", ylabel="agreement on noisy validation images, %"
        )
        for axes, radius in zip(certified, radii, strict=True):
            for method in dict.fromkeys(group.run.method for group in learned):
                points = [group for group in learned if group.run.method == method]
                found = [_percent(group, radius) for group in points]
                axes.plot([group.queries for group in points], [value for value, *_ in found], **_looks(points[0]))
                for group, (value, low, high) in zip(points, found, strict=True):
                    _bar(axes, group.queries, value, low, high, group)
            for group in across:
                axes.axhline(_percent(group, radius)[0], **_looks(group))
            axes.set(
                title=f"certified at radius {radius:.3g}",
                xlabel="victim queries spent",
                ylabel=f"certified {metric}, %",
            )
        for axes in panels[0]:
            axes.set(ylim=(0, 100), xscale="log")  # budgets are multiples of each other
        _legend(figure, [*_largest_budgets(learned), *across], budget=False)
        figure.suptitle(title)
        _save(path)


def _largest_budgets(groups: Sequence[Group]) -> list[Group]:
    """The group with most queries of each method; of white boxes, with most steps."""
    best: dict[str, Group] = {}
    for group in groups:
        other = best.get(group.run.method)
        if other is None or (group.run.budget, group.run.steps or 0) > (other.run.budget, other.run.steps or 0):
            best[group.run.method] = group
    return list(best.values())


def _hits(group: Group, radius: float) -> Array:
    hits = group.hits(radius)
    assert hits is not None  # only what was certified is drawn
    return hits


def _percent(group: Group, radius: float) -> tuple[float, float, float]:
    hits = _hits(group, radius)
    low, high = nested_interval(hits)
    return 100 * float(hits.mean()), 100 * low, 100 * high


def _history(path: Path) -> tuple[list[int], list[float]]:
    """Queries spent, and the agreement of the state that would have been kept had training ended there."""
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):  # a picture is no reason to fail: the run's artifact is what counts
        return [], []
    spent: list[int] = []
    agreement: list[float] = []
    best = float("inf")
    for entry in entries:
        if entry["loss"] < best or not agreement:
            best = entry["loss"]
            agreement.append(100 * entry["agreement"])
        else:
            agreement.append(agreement[-1])
        spent.append(entry["queries"])
    return spent, agreement


def _legend(figure: Figure, groups: Sequence[Group], *, budget: bool) -> None:
    handles = [
        Line2D([], [], label=_name(group, budget=budget), marker=_marker(group), markersize=4.5, **_looks(group))
        for group in groups
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right center")


def _name(group: Group, *, budget: bool) -> str:
    run = group.run
    if group.records[0].white_box:
        return f"{run.method}, {run.steps:,} steps (white box)" if run.steps else f"{run.method} (white box)"
    if not run.budget:
        return f"{run.method} (no queries)"
    return f"{run.method} ({group.queries:,} queries)" if budget else run.method


def _looks(group: Group) -> dict[str, Any]:
    """Line style by what a method may see, solid if it learned from queries; colour and marker within that kind."""
    style, number = _kind_and_number(group.run.method)
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style, "linewidth": 1.6}


def _kind_and_number(name: str) -> tuple[str, int]:
    """A method's line style, and its place among the methods of the table that share it."""
    styles = {
        other: ":" if method.white_box else "-" if method.kind == "learned" else "--"
        for other, method in METHODS.items()
    }
    style = styles.get(name, "-")
    same = [other for other in styles if styles[other] == style]
    return style, same.index(name) if name in same else len(same)


def _marker(group: Group) -> str:
    """One more round of the colours goes with other markers."""
    _, number = _kind_and_number(group.run.method)
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _bar(axes: Axes, place: float, value: float, low: float, high: float, group: Group) -> None:
    yerr = [[max(0.0, value - low)], [max(0.0, high - value)]]
    looks = {**_looks(group), "linewidth": 1, "linestyle": "none"}
    axes.errorbar([place], [value], yerr=yerr, marker=_marker(group), markersize=4.5, capsize=2, **looks)


def _save(path: Path) -> None:
    staging = path.with_name(f".{path.stem}.saving.png")
    plt.savefig(staging, dpi=_DPI)
    plt.close()
    staging.replace(path)
