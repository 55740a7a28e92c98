"""Certificates of many images: the loop that goes on where it was stopped."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from defense.segmentation_smoothing import MaskCertificate, certify_mask
from defense.smoothing import BaseClassifier, Certificate, certify, linf_equivalent
from training.certificates.files import ClassLine, MaskLine, Settings, open_output
from training.command.team import ALONE, Team
from training.data.datasets import ImageSet
from training.measure.scoring import worst_case


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
    """Certifies what an output file lacks, adding a line as soon as an image is done; returns all lines in order.

    Processes of a team take one image at a time, and the first one writes. `indices` are the images' places in their
    split; `batch` noisy images are made at once. Raises as `open_output`.
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


def certify_class(
    classifier: BaseClassifier, image: Tensor, label: int, index: int, settings: Settings, *, batch: int = 1024
) -> Certificate:
    """Certifies one image (C,H,W), with noise that depends on seed and index alone.

    `settings.stop_early` skips the n samples if most of the n0 samples miss the true class. A deployed classifier does
    not know that class; this only saves work on images that count as wrong anyway.
    """

    def hopeless(selection: Tensor) -> bool:
        top = int(selection.argmax())
        return top != label or 2 * int(selection[top]) < settings.n0

    return certify(
        classifier,
        image,
        **_sampling(settings, index, batch),
        give_up=hopeless if settings.stop_early else None,
    )


def _class_line(classifier: BaseClassifier, one: ImageSet, index: int, settings: Settings, batch: int) -> ClassLine:
    begin = time.perf_counter()
    label = int(one.labels[0])
    certificate = certify_class(classifier, one.images[0], label, index, settings, batch=batch)
    return ClassLine(
        **_shared_fields(certificate, one, index, settings, begin),
        label=label,
        prediction=certificate.label,
        correct=certificate.label == label,
    )


def _mask_line(classifier: BaseClassifier, one: ImageSet, index: int, settings: Settings, batch: int) -> MaskLine:
    begin = time.perf_counter()
    assert settings.tau is not None
    certificate = certify_mask(classifier, one.images[0], tau=settings.tau, **_sampling(settings, index, batch))
    dice, iou = worst_case(certificate.labels, one.labels[0])
    return MaskLine(
        **_shared_fields(certificate, one, index, settings, begin),
        dice=dice,
        iou=iou,
        abstained=certificate.abstained,
    )


def _shared_fields(
    certificate: Certificate | MaskCertificate, one: ImageSet, index: int, settings: Settings, begin: float
) -> dict[str, Any]:
    return {
        "index": index,
        "name": one.names[0],
        "radius": certificate.radius,
        "linf_radius_255": 255 * linf_equivalent(certificate.radius, settings.shape),
        "queries": certificate.samples,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _sampling(settings: Settings, index: int, batch: int) -> dict[str, Any]:
    """Arguments that `certify` and `certify_mask` share; an image's noise does not depend on the other images."""
    seed = random.Random(f"{settings.seed}:{index}").getrandbits(63)
    return {
        "sigma": settings.sigma,
        "n0": settings.n0,
        "n": settings.n,
        "alpha": settings.alpha,
        "generator": torch.Generator().manual_seed(seed),
        "batch": batch,
    }
