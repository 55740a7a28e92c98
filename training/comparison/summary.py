"""What a comparison says: rows, a table, and the pictures of `training.comparison.plots`, from all that is finished."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from defense.files import replace_file
from defense.smoothing import linf_equivalent
from training.certificates.config import furthest
from training.command.errors import UserError
from training.comparison import plots
from training.comparison.claims import locked
from training.comparison.config import CompareConfig
from training.comparison.runs import Group, read_groups
from training.measure.intervals import nested_interval
from training.measure.results import Row, measured_row, replace_rows
from training.measure.scoring import ACCURACY, DICE, TITLES

CLAIM = "compare.json"
"""The file that holds what all runs in one folder share."""


def summarize(config: CompareConfig) -> None:
    """Makes rows, table and figures of all that is finished in a folder; UserError if it holds no comparison."""
    out = config.out
    if not (out / CLAIM).exists():
        raise UserError(f"{out} holds no comparison: leave out --summary, or name another --out")
    reference = config.reference
    with locked(out / "locks" / "summary.lock", wait=True):  # so that the last one to write knows of everything
        notes = json.loads((out / CLAIM).read_bytes())
        groups, unfinished = read_groups(out, notes["images"])
        tau = notes.get("tau")
        metric = ACCURACY if tau is None else DICE
        fixed = {"dataset": notes["dataset"], "split": notes["split"], "seed": notes["seed"], "metric": metric}
        fixed["task"] = "classification" if tau is None else "segmentation"
        reach = furthest(notes["n"], notes["alpha"], notes["sigma"], tau)
        radii = config.radii_at(reach, tau)
        title = f"{notes['dataset']}, {notes['split']}: {notes['images']} images, sigma = {notes['sigma']:g}"
        victims = " and ".join(sorted({record.victim for group in groups for record in group.records}))
        converted = ", ".join(f"{r:.3g} = {255 * linf_equivalent(r, tuple(notes['shape'])):.2f}/255" for r in radii)
        test = "" if tau is None else f", tau = {tau:g}"
        early = "the n samples are spared, and the image counts as abstained, where the n0 samples miss the true class"
        text = "\n".join(
            [
                f"{title}, n0 = {notes['n0']}, n = {notes['n']}, alpha = {notes['alpha']:g}{test}; victim {victims}.",
                "",
                markdown_table(groups, radii, reference),
                "",
                f"{TITLES[metric]} in % with 95% bootstrap intervals over images and seeds; abstentions are wrong. "
                "Queries: spent to learn, mean over seeds, validation included.",
                f"Largest certifiable L2 radius {reach:.3f}; L2 in L-infinity: {converted}.",
                *([f"Stopped early: {early}."] if notes["stop_early"] else []),
                *([f"Unfinished: {'; '.join(unfinished)}."] if unfinished else []),
            ]
        )
        replace_rows(out / "results.json", rows_of(groups, radii, reference, fixed))
        replace_file(out / "table.md", f"{text}\n".encode())
        plots.plot_certified(groups, radii, reach, title, TITLES[metric], out / "certified.png")
        plots.plot_queries(groups, radii, out, title, TITLES[metric], out / "queries.png")
    print(f"{text}\n\nBelow {out}: results.json, table.md, certified.png, queries.png")


def rows_of(groups: Sequence[Group], radii: Sequence[float], reference: str, fixed: dict[str, Any]) -> list[Row]:
    """A row a run and L2 radius, and for each method and budget the mean over its seeds and its lead on the reference.

    `fixed` holds dataset, task, split, metric and seed of the measurement, as in `Row`.
    """
    rows: list[Row] = []
    for group in groups:
        for radius in (None, *radii):
            hits = group.hits(radius)
            if hits is None:
                continue
            metric = fixed["metric"] if radius is None else f"certified_{fixed['metric']}"
            what: dict[str, Any] = {"metric": metric}
            if radius is not None:
                what |= {"attack": "certificate", "norm": "l2", "epsilon": radius}
            for record, values in zip(group.records, hits, strict=True):
                mine = {"defense": group.run.method, "queries": record.queries, "seed": record.run.seed}
                rows.append(measured_row(values, **{**fixed, **mine, **what}))
            low, high = nested_interval(hits)
            last = rows[-1]
            mean = replace(last, metric=f"mean_{last.metric}", value=float(hits.mean()), low=low, high=high)
            mean = replace(mean, queries=group.queries, seed=fixed["seed"])
            rows.append(mean)
            if lead := _lead(group, groups, reference, radius):
                value, low, high = lead
                rows.append(replace(mean, metric=f"{metric}_minus_{reference}", value=value, low=low, high=high))
    return rows


def markdown_table(groups: Sequence[Group], radii: Sequence[float], reference: str) -> str:
    """One line a method and budget: what it cost, clean and certified score, and its lead on the reference."""
    against = [f"r={radius:.3g} minus {reference}" for radius in radii]
    lines = [
        (
            "method",
            "queries",
            "white box",
            "seeds",
            "clean",
            *(f"certified r={radius:.3g}" for radius in radii),
            *against,
        )
    ]
    for group in groups:
        white = group.records[0].white_box
        spent = f"{group.run.steps:,} steps" if group.run.steps else f"{group.queries:,}"
        cells = [group.run.method, spent, "white box" if white else ""]
        cells.append(str(len(group.records)))
        for radius in (None, *radii):
            hits = group.hits(radius)
            cells.append("-" if hits is None else _cell(float(hits.mean()), *nested_interval(hits)))
        for radius in radii:
            lead = _lead(group, groups, reference, radius)
            cells.append("-" if lead is None else _cell(*lead, sign="+"))
        lines.append(tuple(cells))
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    padded.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in padded)


def _lead(
    group: Group, groups: Sequence[Group], reference: str, radius: float | None
) -> tuple[float, float, float] | None:
    """Difference to the reference (at the same budget, else its largest) on the same images, and its interval.

    None for the reference itself, or without one.
    """
    others = [other for other in groups if other.run.method == reference]
    if not others or group.run.method == reference:
        return None
    same = [other for other in others if other.run.budget == group.run.budget]
    other = same[0] if same else max(others, key=lambda one: one.run.budget)
    mine, theirs = group.hits(radius), other.hits(radius)
    if mine is None or theirs is None:
        return None
    low, high = nested_interval(mine, theirs)
    return float(mine.mean() - theirs.mean()), low, high


def _cell(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
