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
    """What determines every line of an output file, and so must not change when it is continued.

    Attributes:
        name: Name of the defense.
        artifact: Id of the gateway's artifact; None for a bare victim.
        dataset: Name of the data.
        fingerprint: SHA-256 of the data.
        split: "test" or "validation".
        shape: (C,H,W) of the images.
        sigma: Standard deviation of the noise, in units of [0,1].
        n0: Samples that choose the class.
        n: Samples that bound its probability.
        alpha: Probability that a certificate is wrong.
        seed: Of split and noise.
        stop_early: Whether the n samples were spared where the n0 samples show the image to be lost.
        tau: Share of the samples that has to agree on a pixel's class; None for classes of whole images.
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
    """The settings that a settled configuration and its images give; the others as in `Settings`."""
    assert config.n0 is not None  # it is settled
    assert config.n is not None
    channels, height, width = splits.test.images.shape[1:]
    return Settings(
        name=name,
        artifact=artifact,
        dataset=splits.name,
        fingerprint=splits.fingerprint,
        split=split,
        shape=(channels, height, width),
        sigma=config.sigma,
        n0=config.n0,
        n=config.n,
        alpha=config.alpha,
        seed=seed,
        stop_early=stop_early and config.tau is None,
        tau=config.tau,
    )


@dataclass(frozen=True)
class Line:
    """One image, whatever was certified about it.

    Attributes:
        index: Its place in the split.
        name: Its name.
        radius: Certified L2 radius, in units of [0,1]; 0 when abstained.
        linf_radius_255: The L-inf ball inside it, in 1/255.
        queries: Images sent for it.
        seconds: Time it took.
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
    """The class of an image.

    Attributes:
        label: Its true class.
        prediction: The smoothed class, or `ABSTAIN` (-1).
        correct: Whether the prediction is the label.
    """

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
        dice: Dice with the true mask, every abstaining pixel counted as wrong: no perturbation within the radius gets
            the smoothed segmenter below it.
        iou: Intersection over union, likewise.
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
    """Prepares an output file: begins it, or returns the lines that an earlier run left, by index.

    A last line without its end (the earlier run was killed while it wrote) is cut off; a first one begins anew.

    Raises:
        UserError: The file is no such output, or was written with other settings. It is left as it is.
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
