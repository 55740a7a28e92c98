"""The file of certificates: what determines them, then a line an image, so that a run goes on where it stopped."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from training.certificates.config import CertificateConfig
from training.command.errors import UserError
from training.data.datasets import Splits


@dataclass(frozen=True)
class Settings:
    """What determines every line of an output file, and must not change when it is continued.

    Attributes:
        artifact: Id of the gateway's artifact; None for a bare victim.
        fingerprint: SHA-256 of the data.
        split: "test" or "validation".
        shape: (C,H,W) of the images.
        sigma: Standard deviation of the noise, in units of [0,1].
        n0: Samples that choose the class.
        n: Samples that bound its probability.
        alpha: Probability that a certificate is wrong.
        stop_early: Whether the n samples are skipped if the n0 samples miss the true class.
        tau: Share of the samples that must agree on a pixel's class; None for classes of whole images.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: str
    artifact: str | None
    dataset: str
    fingerprint: str
    split: str
    shape: tuple[int, int, int]
    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    stop_early: bool = False
    tau: float | None = None


def settings_for(
    config: CertificateConfig,
    splits: Splits,
    *,
    split: str,
    seed: int,
    stop_early: bool,
    name: str = "",
    artifact: str | None = None,
) -> Settings:
    """The settings of a configuration that `settled_certificate` returned."""
    channels, height, width = splits.test.images.shape[1:]
    return Settings(
        name=name,
        artifact=artifact,
        dataset=splits.name,
        fingerprint=splits.fingerprint,
        split=split,
        shape=(channels, height, width),
        seed=seed,
        stop_early=stop_early and config.tau is None,
        **config.model_dump(include={"sigma", "n0", "n", "alpha", "tau"}),
    )


@dataclass(frozen=True)
class Line:
    """What is certified of one image.

    Attributes:
        index: Its place in the split.
        radius: Certified L2 radius, in units of [0,1]; 0 if abstained.
        linf_radius_255: Radius of the L-inf ball inside it, in 1/255.
        queries: Images sent for it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    index: int
    name: str
    radius: float
    linf_radius_255: float
    queries: int
    seconds: float


@dataclass(frozen=True)
class ClassLine(Line):
    """The class of an image: true `label`, and the smoothed `prediction` or `ABSTAIN` (-1)."""

    label: int
    prediction: int
    correct: bool

    @property
    def score(self) -> float:
        """What is certified of it: 1 where it is right."""
        return float(self.correct)


@dataclass(frozen=True)
class MaskLine(Line):
    """The mask of an image; all its certified pixels together hold within one radius.

    Attributes:
        dice: Certified Dice: abstaining pixels count as wrong, so no perturbation within the radius gets below it.
        iou: Certified intersection over union.
        abstained: Share of the pixels without an answer.
    """

    dice: float
    iou: float
    abstained: float

    @property
    def score(self) -> float:
        """What is certified of it."""
        return self.dice


_SETTINGS = TypeAdapter(Settings)
_CLASS_LINE = TypeAdapter(ClassLine)
_MASK_LINE = TypeAdapter(MaskLine)


def open_output(path: Path, settings: Settings) -> dict[int, ClassLine | MaskLine]:
    """Starts an output file, or returns the lines that an earlier run left, by index.

    An incomplete last line of a killed run is cut off. Raises UserError, and leaves the file as it is, if it is no such
    output or was written with other settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    beginning = (json.dumps(asdict(settings)) + "\n").encode()
    if beginning.startswith(content) and content != beginning:
        path.write_bytes(beginning)
        return {}
    earlier, done = _parse(path, content)
    if earlier != settings:
        old, new = asdict(earlier), asdict(settings)
        changes = ", ".join(f"{key} was {old[key]}, is {new[key]}" for key in new if old[key] != new[key])
        raise UserError(f"{path} was written with other settings ({changes}): name another file with --out")
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return done


def read_output(path: Path) -> dict[int, ClassLine | MaskLine]:
    """The lines of an output file by index, while another process may be adding to it; none where there is no file."""
    return _parse(path, path.read_bytes())[1] if path.exists() else {}


def _parse(path: Path, content: bytes) -> tuple[Settings, dict[int, ClassLine | MaskLine]]:
    header, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
    try:
        settings = _SETTINGS.validate_json(header)
        read = (_CLASS_LINE if settings.tau is None else _MASK_LINE).validate_json
        done = [read(line) for line in lines]
        return settings, {line.index: line for line in done}
    except ValidationError as error:
        raise UserError(f"{path} is no output of this command: name another file with --out") from error
