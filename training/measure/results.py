"""The results file, one row a measured number, and the tables that are printed from it.

`results.json` is a JSON array with one flat object (the fields of `Row`) a line. Every verb that measures adds its
rows; a row that measures the same thing again replaces the older one.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from defense.files import replace_file
from training.command.errors import UserError
from training.measure.intervals import bootstrap_interval

NO_DEFENSE = "none"
"""The name of the bare victim in the column `defense`."""


@dataclass(frozen=True)
class Row:
    """One measured number, and all that is needed to know what it means.

    Attributes:
        dataset: "brain_mri", "phantom" or a folder's name.
        task: "classification" or "segmentation".
        split: "test" or "validation".
        attack: A name of `defense.attacks.ATTACKS`, "none", "certificate"; `training.redteam`'s begin with "adaptive",
            "outsider" or "corruption".
        norm: "linf", "l2", "severity" (of corruptions), or "none".
        epsilon: Perturbation or certified radius, in units of [0,1], or severity; None: unbounded.
        defense: Its name; `NO_DEFENSE` for the bare victim.
        metric: "accuracy", "dice", "iou", "dice_small" (small lesions), "certified_..."; "abstained" (share of pixels),
            "median_l2", ...
        value: A share for accuracies and the like; None: infinite.
        n: Images it was measured on.
        queries: Victim queries spent to learn the defense.
        seed: Of the command that measured it.
        low: Lower end of the 95% bootstrap interval over the images; None: unknown or infinite.
        high: Upper end of it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=True)

    dataset: str
    task: str
    split: str
    attack: str
    norm: str
    epsilon: float | None
    defense: Annotated[str, Field(alias="defence")]  # the file's spelling, which older results have
    metric: str
    value: float | None
    n: int
    queries: int
    seed: int
    low: float | None = None
    high: float | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What the row measures: everything but the outcome and the number of images."""
        return tuple(value for name, value in asdict(self).items() if name not in {"value", "n", "low", "high"})


_ROW = TypeAdapter(Row)
_ROWS = TypeAdapter(list[Row])


def read_rows(path: Path) -> list[Row]:
    """Reads a results file; a missing file has no rows. Raises UserError if it is no results file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        return _ROWS.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path} is not a results file ({place + ': ' if place else ''}{first['msg']}); it was left as it is: "
            "repair it, move it away, or name another file"
        ) from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a results file, atomically; each replaces an older row of the same identity.

    Raises UserError, and leaves the file as it is, if it is no results file.
    """
    replace_rows(path, {row.identity: row for row in [*read_rows(path), *rows]}.values())


def replace_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a results file of exactly these rows, atomically, whatever was there."""
    lines = (json.dumps(_ROW.dump_python(row, by_alias=True), allow_nan=False) for row in rows)
    replace_file(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def measured_row(
    values: Sequence[float] | npt.NDArray[np.float64],
    *,
    dataset: str,
    task: str,
    split: str,
    defense: str,
    metric: str,
    queries: int,
    seed: int,
    attack: str = "none",
    norm: str = "none",
    epsilon: float | None = None,
) -> Row:
    """The row of one number an image, at least one, with its bootstrap interval; other arguments are fields of `Row`.

    The value is the median if the metric's name begins with "median_", else the mean; inf is allowed.
    """
    array = np.array(values, dtype=np.float64)
    middle: Callable[..., npt.NDArray[np.float64]] = np.median if metric.startswith("median_") else np.mean
    low, high = bootstrap_interval(array, lambda drawn: middle(drawn, axis=1), seed=seed)
    return Row(
        dataset=dataset,
        task=task,
        split=split,
        attack=attack,
        norm=norm,
        epsilon=epsilon,
        defense=defense,
        metric=metric,
        value=finite(float(middle(array))),
        n=len(array),
        queries=queries,
        seed=seed,
        low=finite(low),
        high=finite(high),
    )


def finite(value: float) -> float | None:
    """The value as a `Row` holds it: None when it is infinite."""
    return value if math.isfinite(value) else None


def format_table(rows: Sequence[Row]) -> str:
    """An aligned plain-text table: one line a defense, one column an attack and size, under two header lines.

    Shares are in percent, norms in units of [0,1]; "inf" means beyond everything tried, "-" not measured. Columns and
    lines keep the order of `rows`, the clean images first. All shares must be of one metric, as no column names it.
    """
    columns = list(dict.fromkeys(_column(row) for row in rows))
    columns.sort(key=lambda column: column != _CLEAN)  # stable: only the clean column moves
    cells = {(_line(row), _column(row)): _cell(row) for row in rows}
    several_sets = len({(row.dataset, row.split, row.seed) for row in rows}) > 1
    lines = [("defense", *(("data, seed",) if several_sets else ()), *(head for head, _ in columns), "queries")]
    lines.append(("", *(("",) if several_sets else ()), *(below for _, below in columns), "spent"))
    for line in dict.fromkeys(_line(row) for row in rows):
        dataset, split, seed, defense, queries = line
        where = (f"{dataset} {split}, {seed}",) if several_sets else ()
        lines.append((defense, *where, *(cells.get((line, column), "-") for column in columns), f"{queries:,}"))
    return align(lines, left=2 if several_sets else 1)


def align(lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Pads cells to columns: the first `left` columns to the left, all others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = (
        (
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


_CLEAN = ("clean", "%")
_SHARES = ("accuracy", "dice", "iou", "dice_small", "abstained")


def _line(row: Row) -> tuple[str, str, int, str, int]:
    return row.dataset, row.split, row.seed, row.defense, row.queries


def _is_share(row: Row) -> bool:
    return row.metric.removeprefix("certified_") in _SHARES


def _column(row: Row) -> tuple[str, str]:
    if row.attack == "none" and _is_share(row):
        return _CLEAN
    head = "certified" if row.attack == "certificate" else row.attack
    if row.epsilon is not None:
        size = f"{row.epsilon * 255:g}/255" if row.norm == "linf" else f"{row.epsilon:g}"
        return head, f"r={size}" if row.attack == "certificate" else size
    return head, "%" if _is_share(row) else row.metric.replace("_", " ")


def _cell(row: Row) -> str:
    if row.value is None:
        return "inf"
    return f"{100 * row.value:.1f}" if _is_share(row) else f"{row.value:.3f}"
