r"""How far every estimator is from the true gradient on a real victim, against the queries it spends.

    python -m benchmarks.estimator_error --data ../shared/data/brain_mri \
        --victim artifacts/brain_mri/victim --pretrained artifacts/brain_mri/pretrained --out docs/figures/estimators

At the border of the black box, the gradients of noisy validation images are compared with the exact ones of the open
victim: by their cosine (median over the images on which the victim is unsure: elsewhere there is hardly a gradient), by
their squared error, and by the cosine of the parameters' mean gradient. Writes OUT.json and OUT.png, prints a table.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks import cli
from benchmarks.gradients import Bench, Finding, add_bench_arguments, learn_surrogate, noisy_images, rge, write
from defense.estimators import (
    CoordinateGradientEstimator,
    Difference,
    Guided,
    Isotropic,
    Subspace,
    SurrogateGradient,
    low_frequencies,
)
from defense.surrogates import Surrogate
from services.device import resolve_device
from training.comparison.plots import COLOURS, MARKERS
from training.data.datasets import load_data
from training.fit.pretraining import SANITIZERS, load_pretrained
from training.victim.in_process import in_process


def image_estimators(bench: Bench, surrogates: dict[int, Surrogate]) -> Iterator[Finding]:
    """Those that look at the image."""
    shape = bench.sanitizer.config.input.dimensions
    orthonormal = Isotropic("orthonormal")
    for count in (4, 20, 64, 192, 1024):
        yield bench.measure(f"RGE sphere, q = {count}", rge(count))
    for count in (20, 192):
        yield bench.measure(f"RGE Gaussian, q = {count}", rge(count, where=Isotropic("gaussian")))
        yield bench.measure(f"RGE orthonormal, q = {count}", rge(count, where=orthonormal))
    yield bench.measure("RGE central, q = 20", rge(20, difference="central"))
    for side in (8, 16):
        for count in (4, 16, 64):
            where = Subspace(low_frequencies(shape, side))
            yield bench.measure(f"DCT {side} x {side}, q = {count}", rge(count, where=where, combine="projection"))
    for paid, surrogate in surrogates.items():
        title = f"student of {paid:,}"
        yield bench.measure(f"{title}: gradient", SurrogateGradient(), surrogate)
        for count in (1, 4):
            guided = rge(count, where=Guided(orthonormal), combine="projection")
            yield bench.measure(f"{title}: guided, q = {count}", guided, surrogate)
        dct = Guided(Subspace(low_frequencies(shape, 8)))
        yield bench.measure(f"{title}: guided, DCT 8 x 8, q = 4", rge(4, where=dct, combine="projection"), surrogate)


def code_estimators(bench: Bench) -> Iterator[Finding]:
    """Those that look at the code."""
    for count in (4, 20, 64, 192):
        yield bench.measure(f"RGE sphere, q = {count}", rge(count))
    for count in (20, 192):
        yield bench.measure(f"RGE orthonormal, q = {count}", rge(count, where=Isotropic("orthonormal")))
    differences: tuple[Difference, ...] = ("forward", "central")
    for difference in differences:
        yield bench.measure(f"CGE {difference}", CoordinateGradientEstimator(0.05, difference))


def draw(findings: list[Finding], path: Path) -> None:
    """Draws both cosines against the queries, the estimators of the image by family."""
    families: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.border == "image":
            name = re.sub(r",? q = \d+", "", finding.estimator)
            families.setdefault(name, []).append(finding)
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharex=True)
    titles = ("median cosine with an image's gradient", "cosine with the parameters' gradient over all images")
    for axes, field, title in zip(panels, ("cosine", "parameter_cosine"), titles, strict=True):
        for number, (name, members) in enumerate(families.items()):
            style = "-" if name.startswith("RGE") else "--" if name.startswith("student") else ":"
            axes.plot(
                [finding.queries for finding in members],
                [getattr(finding, field) for finding in members],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=style,
                label=name,
            )
        axes.set(title=title, xlabel="victim queries an image and step, the student's included")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_bench_arguments(parser, 256, "artifacts/estimators")
    parser.add_argument(
        "--students", type=cli.positive_int, nargs="+", default=[5_000, 20_000], help="answers that each learns from"
    )
    parser.add_argument("--student-steps", type=cli.positive_int, default=2400, help="of each student (default 2400)")
    return cli.run(_run, parser)


def _run(arguments: argparse.Namespace) -> int:
    splits = load_data(cli.data_config(arguments))
    parts = {
        name: load_pretrained(arguments.pretrained, name, splits, arguments.sigma).requires_grad_(True)
        for name in SANITIZERS
    }
    for part in parts.values():
        part.freeze_decoder()
    clean, noisy = noisy_images(splits, arguments)
    findings: list[Finding] = []
    with in_process(arguments.victim, resolve_device("cpu"), splits) as victim:
        targets = victim(clean).argmax(1)
        image = Bench("image", parts["denoiser"], victim, noisy, targets)
        print(f"{len(clean)} images, {int(image.unsure.sum())} of them unsure", flush=True)
        surrogates = {
            queries: learn_surrogate(
                image, splits.train.images, queries, arguments.student_steps, arguments.sigma, arguments.seed
            )
            for queries in arguments.students
        }
        code = Bench("code", parts["denoiser+autoencoder"], victim, noisy, targets)
        for finding in (*image_estimators(image, surrogates), *code_estimators(code)):
            findings.append(finding)
            print(finding, flush=True)
    write(findings, arguments.out)
    draw(findings, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
