"""Certificates of many images: their settings, their file, and the loop that goes on where it was stopped."""

import argparse
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from defense.segmentation_smoothing import TAU, certify_mask
from defense.smoothing import BaseClassifier, Certificate, certify, linf_equivalent
from training.certificates.config import furthest
from training.certificates.files import ClassLine, MaskLine, Settings, open_output
from training.command.cli import positive_float, positive_int
from training.command.errors import UserError
from training.command.team import ALONE, Team
from training.data.datasets import ImageSet
from training.measure.endpoints import number_list
from training.measure.intervals import bootstrap_interval
from training.measure.scoring import worst_case

logger = logging.getLogger(__name__)

_MASK_SAMPLES = 10, 100  # n0 and n that suffice for tau = 0.75: unanimous pixels pass Holm's test by far
_CLASS_N0 = 100


def add_certificate_arguments(parser: argparse.ArgumentParser, *, n: int, radii: list[float]) -> None:
    """Adds --sigma, --n0, --n, --alpha, --tau and --radii; `settle_certificate` fills in what depends on the task.

    Args:
        parser: Gets them.
        n: Default of --n for classes.
        radii: Default of --radii for classes.
    """
    n0_mask, n_mask = _MASK_SAMPLES
    told = ",".join(f"{radius:g}" for radius in radii)
    add = parser.add_argument
    add("--sigma", type=positive_float, default=0.25, help="noise, in units of [0,1] (default 0.25)")
    add("--n0", type=positive_int, help=f"samples that choose the class (default {_CLASS_N0}; of pixels {n0_mask})")
    # Its second name is for torchrun, which takes --n for the beginning of flags of its own.
    bound = f"samples that bound it (default {n}; of pixels {n_mask})"
    add("--n", "--samples", type=positive_int, help=bound)
    add("--alpha", type=_probability, default=0.001, help="failure probability (default 0.001)")
    add("--tau", type=_majority, help=f"of masks: share of the samples that must agree on a pixel (default {TAU})")
    add("--radii", type=number_list, help=f"comma-separated L2 radii ({told}; of masks the one that tau gives)")
    parser.set_defaults(class_n=n, class_radii=radii)


def settle_certificate(arguments: argparse.Namespace, chosen: ImageSet) -> None:
    """Fills in the arguments of `add_certificate_arguments` that were left out, and says what no image can reach.

    Raises:
        UserError: One of them means nothing for such labels.
    """
    if chosen.labels.ndim == 1:
        if arguments.tau is not None:
            raise UserError("--tau means nothing for images with one class each: leave it out")
        arguments.n0, arguments.n = arguments.n0 or _CLASS_N0, arguments.n or arguments.class_n
    else:
        arguments.n0, arguments.n = arguments.n0 or _MASK_SAMPLES[0], arguments.n or _MASK_SAMPLES[1]
        arguments.tau = arguments.tau or TAU
    reach = furthest(arguments.n, arguments.alpha, arguments.sigma, arguments.tau)
    arguments.radii = radii_of(arguments, arguments.tau, reach)
    if arguments.tau is None:
        print(f"The largest radius that n = {arguments.n} and alpha = {arguments.alpha:g} can certify is {reach:.3f}")
    else:
        print(f"With tau = {arguments.tau:g}, whatever is certified of a mask is certified at radius {reach:.3f}")
    if beyond := [radius for radius in arguments.radii if radius > reach]:
        how = "--n" if arguments.tau is None else "--tau"
        logger.warning("never certified, however robust: radius %s; raise %s", ", ".join(f"{r:g}" for r in beyond), how)


def radii_of(arguments: argparse.Namespace, tau: float | None, reach: float) -> list[float]:
    """The radii to report: those of --radii, or the default of the task."""
    radii: list[float] = arguments.radii or (arguments.class_radii if tau is None else [reach])
    return radii


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
        generator=_noise_of(seed, index),
        batch=batch,
        give_up=None if stop_unless is None else hopeless,
    )
    return certificate, certificate.samples


def certify_images(
    classifier: BaseClassifier,
    chosen: ImageSet,
    indices: Sequence[int],
    path: Path,
    settings: Settings,
    *,
    batch: int = 1024,
    team: Team = ALONE,
) -> list[ClassLine | MaskLine]:
    """Certifies what an output file lacks, adding a line an image as soon as it is known.

    Of several processes each takes an image at a time, and the first one writes; the lines are those of one process.

    Args:
        classifier: The base classifier.
        chosen: The images.
        indices: The place of each in its split.
        path: The output file; see `open_output`, also for the errors.
        settings: What determines its lines.
        batch: Noisy images made at once.
        team: The processes that share the images.

    Returns:
        The lines of all images, in their order.
    """
    done = team.told(lambda: open_output(path, settings))
    make = _class_line if settings.tau is None else _mask_line
    missing = [(place, index) for place, index in enumerate(indices) if index not in done]
    hidden = None if team.is_first else True
    with tqdm(total=len(missing), desc=f"certify {settings.name}", unit="image", disable=hidden) as bar:
        for begin in range(0, len(missing), team.size):
            mine = missing[begin + team.rank : begin + team.rank + 1]
            own = [make(classifier, chosen.subset([place]), index, settings, batch) for place, index in mine]
            lines = [line for part in team.all(own) for line in part]
            done.update((line.index, line) for line in lines)
            if team.is_first:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)
            bar.update(len(lines))
    return [done[index] for index in indices]


def _class_line(classifier: BaseClassifier, one: ImageSet, index: int, settings: Settings, batch: int) -> ClassLine:
    begin = time.perf_counter()
    label = int(one.labels[0])
    certificate, queries = certify_image(
        classifier,
        one.images[0],
        index,
        sigma=settings.sigma,
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        seed=settings.seed,
        batch=batch,
        stop_unless=label if settings.stop_early else None,
    )
    return ClassLine(
        index=index,
        name=one.names[0],
        label=label,
        prediction=certificate.label,
        radius=certificate.radius,
        linf_radius_255=255 * linf_equivalent(certificate.radius, settings.shape),
        correct=certificate.label == label,
        queries=queries,
        seconds=round(time.perf_counter() - begin, 3),
    )


def _mask_line(classifier: BaseClassifier, one: ImageSet, index: int, settings: Settings, batch: int) -> MaskLine:
    begin = time.perf_counter()
    assert settings.tau is not None
    certificate = certify_mask(
        classifier,
        one.images[0],
        sigma=settings.sigma,
        n0=settings.n0,
        n=settings.n,
        tau=settings.tau,
        alpha=settings.alpha,
        generator=_noise_of(settings.seed, index),
        batch=batch,
    )
    dice, iou = worst_case(certificate.labels, one.labels[0])
    return MaskLine(
        index=index,
        name=one.names[0],
        radius=certificate.radius,
        linf_radius_255=255 * linf_equivalent(certificate.radius, settings.shape),
        queries=certificate.samples,
        seconds=round(time.perf_counter() - begin, 3),
        dice=dice,
        iou=iou,
        abstained=certificate.abstained,
    )


def _noise_of(seed: int, index: int) -> torch.Generator:
    """The source of an image's noise, whichever others are certified."""
    return torch.Generator().manual_seed(random.Random(f"{seed}:{index}").getrandbits(63))


def certified_score(lines: Sequence[ClassLine | MaskLine], radius: float, seed: int) -> tuple[float, float, float]:
    """Mean of what is certified with at least `radius`, and its 95% bootstrap interval."""
    certified = np.array([line.score if line.radius >= radius else 0.0 for line in lines], dtype=np.float64)
    return float(certified.mean()), *bootstrap_interval(certified, seed=seed)


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def _majority(text: str) -> float:
    value = float(text)
    if not 0.5 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0.5 and below 1, got {text}")
    return value
