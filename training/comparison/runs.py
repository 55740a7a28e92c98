"""The runs of a comparison: which there are, what is known of each, and what it puts before the victim."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from defense.artifact import Artifact, load_artifact
from defense.files import replace_file
from defense.preprocessors import PREPROCESSORS
from training.certificates.files import read_output
from training.command.errors import UserError
from training.comparison.methods import METHODS
from training.measure.results import NO_DEFENSE

Front = Callable[[Tensor], Tensor]
"""What images pass before the victim: (N,C,H,W) of any finite range -> the same shape."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One method at one budget and seed.

    Attributes:
        method: Its name.
        budget: Victim queries it may spend; 0 for a method without queries, and for a white box.
        seed: Of its training; 0 for a method that is not trained here.
        steps: Of a white box, which no budget bounds; else None.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    method: str
    budget: int
    seed: int
    steps: int | None = None

    @property
    def place(self) -> Path:
        """Where it is, below a comparison's folder and below its `certify`."""
        return Path(self.method) / (f"{self.steps}steps-{self.seed}" if self.steps else f"{self.budget}-{self.seed}")

    def __str__(self) -> str:
        """The run's name for people."""
        return self.place.as_posix()


@dataclass(frozen=True)
class Record:
    """What is known of a run beside its certificates.

    Attributes:
        white_box: Whether it saw the victim's gradients.
        victim: "in process" or "over HTTP".
        artifact: Id of its sanitizer, if any.
        queries: Victim queries spent to learn.
        clean: Index and score of the deterministic pass (`training.measure.scoring`) of each image.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    run: Run
    white_box: bool
    victim: str
    artifact: str | None
    queries: int
    clean: list[tuple[int, Annotated[float, Field(strict=False)]]]  # older records hold true and false

    def save(self, out: Path) -> None:
        """Writes it below the comparison's folder, atomically."""
        replace_file(record_path(out, self.run), (json.dumps(asdict(self)) + "\n").encode())


_RECORD = TypeAdapter(Record)


def record_path(out: Path, run: Run) -> Path:
    """The file of a run's record; that of its certificates stands beside it."""
    return out / "certify" / run.place.with_name(run.place.name + ".json")


def certificates_path(out: Path, run: Run) -> Path:
    """The file of a run's certificates."""
    return out / "certify" / run.place.with_name(run.place.name + ".jsonl")


def finished(out: Path, run: Run, images: int) -> Record | None:
    """The record of a run that has measured so many images; None of any other."""
    path = record_path(out, run)
    record = _RECORD.validate_json(path.read_bytes()) if path.exists() else None
    if record is None or len(record.clean) < images:
        return None
    return record if run.method == NO_DEFENSE or len(read_output(certificates_path(out, run))) >= images else None


def read_records(out: Path) -> list[Record]:
    """All records below a comparison's folder, in the order of `METHODS`, then by budget and seed.

    Raises UserError if one of the files is no record.
    """
    records = []
    for path in sorted(out.glob("certify/*/*.json")):
        try:
            records.append(_RECORD.validate_json(path.read_bytes()))
        except ValidationError as error:
            raise UserError(f"{path} is no record of a run: move it away") from error
    order = {name: number for number, name in enumerate(METHODS)}
    return sorted(records, key=lambda one: (order.get(one.run.method, len(order)), one.run.budget, one.run.seed))


@dataclass(frozen=True)
class Group:
    """The finished runs of one method at one budget: its seeds, on the same images in the same order.

    Attributes:
        records: One a seed.
        clean: (S,n) score of the deterministic pass: 1 if correct, the Dice of a mask.
        certified: (S,n) score of the smoothed answer; None without certificates.
        radii: (S,n) certified radii; None without certificates.
    """

    records: list[Record]
    clean: Array
    certified: Array | None
    radii: Array | None

    @property
    def run(self) -> Run:
        """The run of its first seed."""
        return self.records[0].run

    @property
    def queries(self) -> int:
        """Queries spent to learn, mean over the seeds."""
        return round(sum(record.queries for record in self.records) / len(self.records))

    def hits(self, radius: float | None) -> Array | None:
        """(S,n) the images' scores: what is certified at a radius, or clean where that is None."""
        if radius is None:
            return self.clean
        if self.radii is None or self.certified is None:
            return None
        return np.where(self.radii >= radius, self.certified, 0.0)


def read_groups(out: Path, images: int) -> tuple[list[Group], list[str]]:
    """All finished runs (those with `images` images) below a comparison's folder, and a text on each unfinished one."""
    found: dict[tuple[str, int, int | None], list[tuple[Record, list[tuple[float, float]] | None]]] = {}
    unfinished = []
    for record in read_records(out):
        lines = read_output(certificates_path(out, record.run))
        smoothed = record.run.method != NO_DEFENSE
        done = sum(index in lines for index, _ in record.clean) if smoothed else len(record.clean)
        if min(done, len(record.clean)) < images:
            unfinished.append(f"{record.run}: {done} of {images} images")
            continue
        order = [index for index, _ in record.clean]
        pairs = [(lines[index].score, lines[index].radius) for index in order] if smoothed else None
        key = (record.run.method, record.run.budget, record.run.steps)
        found.setdefault(key, []).append((record, pairs))
    groups = []
    for members in found.values():
        records = [record for record, _ in members]
        clean = np.array([[score for _, score in record.clean] for record in records], dtype=np.float64)
        smooth = np.array([pairs for _, pairs in members if pairs is not None], dtype=np.float64)
        certified, radii = (smooth[..., 0], smooth[..., 1]) if smooth.size else (None, None)
        groups.append(Group(records, clean, certified, radii))
    return groups, unfinished


def plan(names: Sequence[str], budgets: Sequence[int], seeds: Sequence[int], fo_steps: int) -> list[Run]:
    """The runs of a comparison: first what needs no training, then seed by seed, smaller budgets first.

    White boxes take `fo_steps` steps in place of a budget.
    """
    free = [Run(name, 0, 0) for name in names if METHODS[name].kind != "learned"]
    learned = [name for name in names if METHODS[name].kind == "learned"]
    runs = []
    for seed in seeds:
        runs += [Run(name, 0, seed, fo_steps) for name in learned if METHODS[name].white_box]
        runs += [Run(name, budget, seed) for budget in budgets for name in learned if not METHODS[name].white_box]
    return free + runs


def build_front(run: Run, out: Path, pretrained: Path | None, device: torch.device) -> tuple[Front, Artifact | None]:
    """What stands before the victim in a finished run, in evaluation mode, and the artifact that it is from.

    `out` is the comparison's folder; `pretrained` is needed for methods from there only.
    """
    method = METHODS[run.method]
    match method.kind:
        case "bare":
            return (lambda images: images), None
        case "preprocessor":
            return PREPROCESSORS[method.part], None
    assert method.kind == "learned" or pretrained is not None  # checked before anything ran
    artifact = load_artifact(out / run.place if method.kind == "learned" else (pretrained or out) / method.part)
    sanitizer = artifact.sanitizer.to(device).eval()
    sanitizer.to(memory_format=torch.channels_last)  # a third faster on a CPU
    if method.kind != "autoencoder":
        return sanitizer, artifact
    autoencoder = sanitizer.autoencoder
    assert autoencoder is not None  # the artifact's name says so
    return (lambda images: autoencoder(images).clamp(0, 1)), artifact
