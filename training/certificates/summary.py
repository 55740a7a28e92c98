"""What the certificates of many images say together: a table for people, and rows for the results file."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from defense.smoothing import ABSTAIN, linf_equivalent
from training.certificates.files import ClassLine, MaskLine, Settings
from training.measure.intervals import bootstrap_interval
from training.measure.results import Row, align, measured_row

Lines = Sequence[ClassLine | MaskLine]


def certified_score(lines: Lines, radius: float, seed: int) -> tuple[float, float, float]:
    """Mean of what is certified with at least `radius`, and its 95% bootstrap interval."""
    certified = _held(lines, [line.score for line in lines], radius)
    return float(np.mean(certified)), *bootstrap_interval(certified, seed=seed)


def certificate_table(lines: Lines, radii: Sequence[float], settings: Settings) -> str:
    """A head that says what was certified, and a line a radius: its L-inf equivalent, the score, its interval."""
    metric = "%" if settings.tau is None else "Dice, %"
    table = [("L2 radius", "L-inf /255", f"certified {metric}", "95% interval")]
    for radius in radii:
        share, low, high = (100 * value for value in certified_score(lines, radius, settings.seed))
        linf = 255 * linf_equivalent(radius, settings.shape)
        table.append((f"{radius:g}", f"{linf:.3f}", f"{share:.1f}", f"{low:.1f}-{high:.1f}"))
    masks = [line for line in lines if isinstance(line, MaskLine)]
    if masks:
        share = 100 * sum(line.abstained for line in masks) / len(masks)
        abstained, test = f"{share:.1f}% of the pixels abstained", f", tau {settings.tau:g}"
    else:
        count = sum(isinstance(line, ClassLine) and line.prediction == ABSTAIN for line in lines)
        abstained, test = f"{count} abstained", ""
    head = (
        f"{settings.name} on {settings.dataset}, {settings.split}: {len(lines)} images, {abstained} "
        f"(counted as wrong); sigma {settings.sigma:g}, n0 {settings.n0}, n {settings.n}{test}, "
        f"alpha {settings.alpha:g}"
    )
    return f"{head}\n{align(table, left=0)}"


def certificate_rows(lines: Lines, radii: Sequence[float], settings: Settings, queries: int) -> list[Row]:
    """Rows of every radius: accuracy, or Dice, IoU and abstaining pixels; `queries` were spent to learn the defense."""
    row = partial(
        measured_row,
        dataset=settings.dataset,
        task="classification" if settings.tau is None else "segmentation",
        split=settings.split,
        defense=settings.name,
        queries=queries,
        seed=settings.seed,
        attack="certificate",
        norm="l2",
    )
    masks = [line for line in lines if isinstance(line, MaskLine)]
    metrics = {"dice" if masks else "accuracy": [line.score for line in lines]}
    if masks:
        metrics["iou"] = [line.iou for line in masks]
    rows = []
    for radius in radii:
        for metric, values in metrics.items():
            rows.append(row(_held(lines, values, radius), metric=f"certified_{metric}", epsilon=radius))
        if masks:
            rows.append(row([line.abstained for line in masks], metric="abstained", epsilon=radius))
    return rows


def _held(lines: Lines, values: Sequence[float], radius: float) -> list[float]:
    """The values of images that are certified with at least a radius, 0 for the others."""
    return [value if line.radius >= radius else 0.0 for line, value in zip(lines, values, strict=True)]
