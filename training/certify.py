r"""python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data DIR|phantom --sigma 0.25.

    python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data phantom --sigma 0.25 \
        --n0 100 --n 10000 --alpha 0.001 --limit 100 --radii 0,0.25,0.5,0.75 --out artifacts/certify/zo-ae-ds.jsonl

Certifies whatever answers at the URL, a gateway and its victim or a bare victim, as the base classifier of randomised
smoothing (`defense.smoothing`). The Gaussian noise is added here and is not clipped; n0 + n queries an image.

The output is one JSON object a line: first the settings, then an image a line as soon as it is known, so that a run
that was stopped goes on where it was when the same command is given again. Certified accuracy at a radius is the share
of images answered right with at least that radius; an abstention counts as wrong, also that of --stop-early. The rows
in the results file do not hold sigma: give a defense that is certified at several a --name for each.

With `torchrun --nproc-per-node N -m training.certify ...` N processes share the images; the certificates are the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defense.smoothing import ABSTAIN, linf_equivalent
from training.certificates.certification import (
    add_certificate_arguments,
    certified_score,
    certify_images,
    settle_certificate,
)
from training.certificates.files import ClassLine, MaskLine, Settings
from training.command.cli import positive_int, run
from training.command.team import joined
from training.data.datasets import load_data
from training.measure.endpoints import Connect, add_measuring_arguments, connect, defense_name, identify
from training.measure.results import Row, align, score_row, write_rows
from training.measure.selection import chosen_images


def main(argv: Sequence[str] | None = None, *, connect: Connect = connect) -> int:
    """Runs the verb.

    Args:
        argv: The arguments, without the program's name.
        connect: Makes the client of a URL; tests pass one without sockets.
    """
    return run(lambda arguments: _certify(arguments, connect), _parser(), argv)


def _certify(arguments: argparse.Namespace, connect: Connect) -> int:
    splits = load_data(arguments)
    indices, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    settle_certificate(arguments, chosen)
    path = arguments.out or Path("artifacts/certify") / f"{arguments.name}.jsonl"
    channels, height, width = chosen.images.shape[1:]
    with joined() as team, connect(arguments.url) as endpoint:
        identity = team.told(lambda: identify(endpoint, arguments.url, chosen.images[0], splits.labels))
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
            stop_early=arguments.stop_early and arguments.tau is None,
            tau=arguments.tau,
        )
        lines = certify_images(endpoint, chosen, indices, path, settings, batch=arguments.batch, team=team)
        if not team.is_first:
            return 0
    _report(lines, arguments.radii, settings)
    write_rows(arguments.results, _rows(lines, arguments.radii, settings, identity.queries))
    print(f"Every image in {path}; rows added to {arguments.results}")
    return 0


def _report(lines: Sequence[ClassLine | MaskLine], radii: Sequence[float], settings: Settings) -> None:
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
    print(
        f"{settings.name} on {settings.dataset}, {settings.split}: {len(lines)} images, {abstained} "
        f"(counted as wrong); sigma {settings.sigma:g}, n0 {settings.n0}, n {settings.n}{test}, "
        f"alpha {settings.alpha:g}"
    )
    print(align(table, left=0))


def _rows(lines: Sequence[ClassLine | MaskLine], radii: Sequence[float], settings: Settings, queries: int) -> list[Row]:
    shared: dict[str, Any] = {
        "dataset": settings.dataset,
        "split": settings.split,
        "defense": settings.name,
        "queries": queries,
        "seed": settings.seed,
        "task": "classification" if settings.tau is None else "segmentation",
    }
    metrics = {"accuracy" if settings.tau is None else "dice": [line.score for line in lines]}
    if masks := [line for line in lines if isinstance(line, MaskLine)]:
        metrics["iou"] = [line.iou for line in masks]
    rows = []
    for radius in radii:
        for metric, values in metrics.items():
            held = [value if line.radius >= radius else 0.0 for line, value in zip(lines, values, strict=True)]
            rows.append(score_row(held, **shared, metric=f"certified_{metric}", radius=radius))
        if masks:
            share = [line.abstained for line in masks]
            rows.append(score_row(share, **shared, metric="abstained", radius=radius))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.certify", description="Certifies what answers at a URL.")
    add_measuring_arguments(parser)
    parser.add_argument("--url", required=True, help="where the base classifier answers: a gateway, or a bare victim")
    parser.add_argument("--name", type=defense_name, required=True, help="name of the defense in the results")
    add_certificate_arguments(parser, n=10_000, radii=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--stop-early", action="store_true", help="spare the n samples where n0 samples show no hope")
    parser.add_argument("--batch", type=positive_int, default=1024, help="noisy images made at once (default 1024)")
    parser.add_argument("--out", type=Path, help="one line an image (default artifacts/certify/NAME.jsonl)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
