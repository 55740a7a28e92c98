"""Certificates of many images: their settings, their file, and the loop that goes on where it was stopped."""

import argparse
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor
from tqdm import tqdm

from defense.smoothing import BaseClassifier, Certificate, certify, largest_radius, linf_equivalent
from training.cli import UserError, positive_float, positive_int
from training.datasets import ImageSet
from training.measuring import number_list
from training.results import bootstrap_interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What determines every line of an output file, and so must not change when it is continued.

    Attributes:
        name: Name of the defence.
        artifact: Id of the gateway's artifact; None for a bare victim.
        dataset: Name of the data.
        fingerprint: SHA-256 of the data.
        split: "test" or "validation".
        shape: (C,H,W) of the images.
        sigma: Standard deviation of the noise, in units of [0,1].
        n0: Samples that choose the class.
        n: Samples that bound its probability.
        alpha: Probability that a certificate is wrong.
        seed: Seed of split and noise; every image has its own stream, whichever others are certified.
        stop_early: Whether images that the n0 samples show to be lost were spared the n samples.
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


@dataclass(frozen=True)
class Line:
    """One image.

    Attributes:
        index: Its place in the split.
        name: Its name.
        label: Its true class.
        prediction: The smoothed class, or `ABSTAIN` (-1).
        radius: Certified L2 radius, in units of [0,1]; 0 when abstained.
        linf_radius_255: The L-inf ball inside it, in 1/255.
        correct: Whether the prediction is the label.
        queries: Images sent for it.
        seconds: Time it took.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    index: int
    name: str
    label: int
    prediction: int
    radius: float
    linf_radius_255: float
    correct: bool
    queries: int
    seconds: float


_SETTINGS = TypeAdapter(Settings)
_LINE = TypeAdapter(Line)


def add_certificate_arguments(parser: argparse.ArgumentParser, *, n: int, radii: list[float]) -> None:
    """Adds --sigma, --n0, --n, --alpha and --radii, the last two with these defaults for n and radii."""
    parser.add_argument("--sigma", type=positive_float, default=0.25, help="noise, in units of [0,1] (default 0.25)")
    parser.add_argument("--n0", type=positive_int, default=100, help="samples that choose the class (default 100)")
    parser.add_argument("--n", type=positive_int, default=n, help=f"samples that bound it (default {n})")
    parser.add_argument("--alpha", type=_probability, default=0.001, help="failure probability (default 0.001)")
    told = ",".join(f"{radius:g}" for radius in radii)
    parser.add_argument("--radii", type=number_list, default=radii, help=f"comma-separated L2 radii ({told})")


def warn_of_radii(arguments: argparse.Namespace) -> None:
    """Says what `add_certificate_arguments` asked for that no image can reach."""
    reach = largest_radius(arguments.n, arguments.alpha, arguments.sigma)
    print(f"The largest radius that n = {arguments.n} and alpha = {arguments.alpha:g} can certify is {reach:.3f}")
    if beyond := [radius for radius in arguments.radii if radius > reach]:
        logger.warning("never certified, however robust: radius %s; raise --n", ", ".join(f"{r:g}" for r in beyond))


def certify_image(
    classifier: BaseClassifier,
    image: Tensor,
    index: int,
    *,
    sigma: float,
    n0: int,
    n: int,
    alpha: float,
    seed: int,
    batch: int,
    stop_unless: int | None = None,
) -> tuple[Certificate, int]:
    """`defense.smoothing.certify` with noise that depends on (seed, index) only, and optionally an early stop.

    The early stop: where most of the n0 samples are not of the class `stop_unless`, the certificate abstains and the n
    samples are spared. The true label is not known to a deployed classifier; it only spares the work on images that
    would count as wrong whatever their certificate said.

    Args:
        classifier: The base classifier.
        image: (C,H,W) float32.
        index: The image's place in its split, which with `seed` decides its noise.
        sigma: Standard deviation of the noise.
        n0: Samples that choose the class.
        n: Samples that bound its probability.
        alpha: Probability that the certificate is wrong.
        seed: Seed of the noise.
        batch: Noisy images made at once.
        stop_unless: The true class, to stop early; None: never.

    Returns:
        The certificate, and the images that the classifier was asked about.
    """

    def hopeless(selection: Tensor) -> bool:
        top = int(selection.argmax())
        return top != stop_unless or 2 * int(selection[top]) < n0

    certificate = certify(
        classifier,
        image,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        generator=torch.Generator().manual_seed(random.Random(f"{seed}:{index}").getrandbits(63)),
        batch=batch,
        give_up=None if stop_unless is None else hopeless,
    )
    return certificate, certificate.samples


def open_output(path: Path, settings: Settings) -> dict[int, Line]:
    """Prepares an output file: begins it, or reads what an earlier run left.

    A last line without its end (the earlier run was killed while it wrote) is cut off; a first one begins anew.

    Returns:
        The lines that are there already, by index.

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


def read_output(path: Path) -> dict[int, Line]:
    """The lines of an output file by index, while another process may be adding to it; none where there is no file."""
    return _parse(path, path.read_bytes())[1] if path.exists() else {}


def _parse(path: Path, content: bytes) -> tuple[Settings, dict[int, Line]]:
    header, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [b""]
    try:
        done = [_LINE.validate_json(line) for line in lines]
        return _SETTINGS.validate_json(header), {line.index: line for line in done}
    except ValidationError as error:
        raise UserError(f"{path} is no output of this command: name another file with --out") from error


def certify_images(
    classifier: BaseClassifier,
    chosen: ImageSet,
    indices: Sequence[int],
    path: Path,
    settings: Settings,
    *,
    batch: int = 1024,
) -> list[Line]:
    """Certifies what an output file lacks, adding a line an image as soon as it is known.

    Args:
        classifier: The base classifier.
        chosen: The images.
        indices: The place of each in its split.
        path: The output file; see `open_output`, also for the errors.
        settings: What determines its lines.
        batch: Noisy images made at once.

    Returns:
        The lines of all images, in their order.
    """
    done = open_output(path, settings)
    with path.open("a", encoding="utf-8") as file:
        for place, index in enumerate(tqdm(indices, desc=f"certify {settings.name}", unit="image", disable=None)):
            if index in done:
                continue
            begin = time.perf_counter()
            label = int(chosen.labels[place])
            certificate, queries = certify_image(
                classifier,
                chosen.images[place],
                index,
                sigma=settings.sigma,
                n0=settings.n0,
                n=settings.n,
                alpha=settings.alpha,
                seed=settings.seed,
                batch=batch,
                stop_unless=label if settings.stop_early else None,
            )
            line = Line(
                index=index,
                name=chosen.names[place],
                label=label,
                prediction=certificate.label,
                radius=certificate.radius,
                linf_radius_255=255 * linf_equivalent(certificate.radius, settings.shape),
                correct=certificate.label == label,
                queries=queries,
                seconds=round(time.perf_counter() - begin, 3),
            )
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            done[index] = line
    return [done[index] for index in indices]


def certified_accuracy(lines: Sequence[Line], radius: float, seed: int) -> tuple[float, float, float]:
    """Share of images answered right with at least `radius`, and its 95% bootstrap interval."""
    certified = np.array([line.correct and line.radius >= radius for line in lines], dtype=np.float64)
    return float(certified.mean()), *bootstrap_interval(certified, seed=seed)


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value
