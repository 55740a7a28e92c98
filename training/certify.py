r"""python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data DIR|phantom --sigma 0.25.

    python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data phantom --sigma 0.25 \
        --n0 100 --n 10000 --alpha 0.001 --limit 100 --radii 0,0.25,0.5,0.75 --out artifacts/certify/zo-ae-ds.jsonl

Certifies whatever answers at the URL, a gateway and its victim or a bare victim, as the base classifier of randomised
smoothing (`defense.smoothing`). The Gaussian noise is added here and is not clipped; n0 + n queries an image.

The output is one JSON object a line: first the settings, then an image a line as soon as it is known, so that a run
that was stopped goes on where it was when the same command is given again. Certified accuracy at a radius is the share
of images answered right with at least that radius; an abstention counts as wrong. The rows in the results file do not
hold sigma: give a defence that is certified at several a --name for each.
"""

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tqdm import tqdm

from defense.smoothing import ABSTAIN, certify, largest_radius, linf_equivalent
from training.cli import UserError, positive_float, positive_int, run
from training.datasets import load_data
from training.measuring import (
    Connect,
    add_measuring_arguments,
    chosen_images,
    connect,
    defence_name,
    identify,
    number_list,
)
from training.results import Row, align, bootstrap_interval, write_rows

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
    whole = content[: content.rfind(b"\n") + 1]
    header, *lines = whole.splitlines() or [b""]
    try:
        earlier = _SETTINGS.validate_json(header)
        done = [_LINE.validate_json(line) for line in lines]
    except ValidationError as error:
        raise UserError(f"{path} is no output of this command: name another file with --out") from error
    if earlier != settings:
        old, new = asdict(earlier), asdict(settings)
        changes = ", ".join(f"{key} was {old[key]}, is {new[key]}" for key in new if old[key] != new[key])
        raise UserError(f"{path} was written with other settings ({changes}): name another file with --out")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return {line.index: line for line in done}


def certified_accuracy(lines: Sequence[Line], radius: float, seed: int) -> tuple[float, float, float]:
    """Share of images answered right with at least `radius`, and its 95% bootstrap interval."""
    certified = np.array([line.correct and line.radius >= radius for line in lines], dtype=np.float64)
    return float(certified.mean()), *bootstrap_interval(certified, seed=seed)


def main(argv: Sequence[str] | None = None, *, connect: Connect = connect) -> int:
    """Runs the verb.

    Args:
        argv: The arguments, without the program's name.
        connect: Makes the client of a URL; tests pass one without sockets.
    """
    return run(lambda arguments: _certify(arguments, connect), _parser(), argv)


def _certify(arguments: argparse.Namespace, connect: Connect) -> int:
    _warn_of_radii(arguments)
    splits = load_data(arguments)
    indices, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    path = arguments.out or Path("artifacts/certify") / f"{arguments.name}.jsonl"
    channels, height, width = chosen.images.shape[1:]
    with connect(arguments.url) as endpoint:
        identity = identify(endpoint, arguments.url, chosen.images[0], splits.labels)
        settings = Settings(
            name=arguments.name,
            artifact=identity.artifact,
            dataset=splits.name,
            fingerprint=splits.fingerprint,
            split=arguments.split,
            shape=(channels, height, width),
            sigma=arguments.sigma,
            n0=arguments.n0,
            n=arguments.n,
            alpha=arguments.alpha,
            seed=arguments.seed,
        )
        done = open_output(path, settings)
        with path.open("a", encoding="utf-8") as file:
            for place, index in enumerate(tqdm(indices, desc=f"certify {arguments.name}", unit="image")):
                if index in done:
                    continue
                begin = time.perf_counter()
                certificate = certify(
                    endpoint,
                    chosen.images[place],
                    sigma=settings.sigma,
                    n0=settings.n0,
                    n=settings.n,
                    alpha=settings.alpha,
                    generator=_noise_source(settings.seed, index),
                    batch=arguments.batch,
                )
                label = int(chosen.labels[place])
                line = Line(
                    index=index,
                    name=chosen.names[place],
                    label=label,
                    prediction=certificate.label,
                    radius=certificate.radius,
                    linf_radius_255=255 * linf_equivalent(certificate.radius, settings.shape),
                    correct=certificate.label == label,
                    queries=settings.n0 + settings.n,
                    seconds=round(time.perf_counter() - begin, 3),
                )
                file.write(json.dumps(asdict(line)) + "\n")
                file.flush()
                done[index] = line
    lines = [done[index] for index in indices]
    _report(lines, arguments.radii, settings)
    write_rows(arguments.results, _rows(lines, arguments.radii, settings, identity.queries))
    print(f"Every image in {path}; rows added to {arguments.results}")
    return 0


def _warn_of_radii(arguments: argparse.Namespace) -> None:
    reach = largest_radius(arguments.n, arguments.alpha, arguments.sigma)
    print(f"The largest radius that n = {arguments.n} and alpha = {arguments.alpha:g} can certify is {reach:.3f}")
    if beyond := [radius for radius in arguments.radii if radius > reach]:
        logger.warning("never certified, however robust: radius %s; raise --n", ", ".join(f"{r:g}" for r in beyond))


def _noise_source(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(f"{seed}:{index}").getrandbits(63))


def _report(lines: Sequence[Line], radii: Sequence[float], settings: Settings) -> None:
    table = [("L2 radius", "L-inf /255", "certified %", "95% interval")]
    for radius in radii:
        share, low, high = (100 * value for value in certified_accuracy(lines, radius, settings.seed))
        linf = 255 * linf_equivalent(radius, settings.shape)
        table.append((f"{radius:g}", f"{linf:.3f}", f"{share:.1f}", f"{low:.1f}-{high:.1f}"))
    abstained = sum(line.prediction == ABSTAIN for line in lines)
    print(
        f"{settings.name} on {settings.dataset}, {settings.split}: {len(lines)} images, {abstained} abstained "
        f"(counted as wrong); sigma {settings.sigma:g}, n0 {settings.n0}, n {settings.n}, alpha {settings.alpha:g}"
    )
    print(align(table, left=0))


def _rows(lines: Sequence[Line], radii: Sequence[float], settings: Settings, queries: int) -> list[Row]:
    rows = []
    for radius in radii:
        share, low, high = certified_accuracy(lines, radius, settings.seed)
        rows.append(
            Row(
                dataset=settings.dataset,
                task="classification",
                split=settings.split,
                attack="certificate",
                norm="l2",
                epsilon=radius,
                defence=settings.name,
                metric="certified_accuracy",
                value=share,
                n=len(lines),
                queries=queries,
                seed=settings.seed,
                low=low,
                high=high,
            )
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.certify", description="Certifies what answers at a URL.")
    add_measuring_arguments(parser)
    parser.add_argument("--url", required=True, help="where the base classifier answers: a gateway, or a bare victim")
    parser.add_argument("--name", type=defence_name, required=True, help="name of the defence in the results")
    parser.add_argument("--sigma", type=positive_float, default=0.25, help="noise, in units of [0,1] (default 0.25)")
    parser.add_argument("--n0", type=positive_int, default=100, help="samples that choose the class (default 100)")
    parser.add_argument("--n", type=positive_int, default=10_000, help="samples that bound it (default 10000)")
    parser.add_argument("--alpha", type=_probability, default=0.001, help="failure probability (default 0.001)")
    parser.add_argument(
        "--radii", type=number_list, default=[0.0, 0.25, 0.5, 0.75], help="comma-separated L2 radii (0,0.25,0.5,0.75)"
    )
    parser.add_argument("--batch", type=positive_int, default=1024, help="noisy images made at once (default 1024)")
    parser.add_argument("--out", type=Path, help="one line an image (default artifacts/certify/NAME.jsonl)")
    return parser


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
