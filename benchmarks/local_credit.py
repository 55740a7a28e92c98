r"""Local credit against global estimates, at the image and at a spatial code, on a real segmenter.

    python -m benchmarks.local_credit --data ../shared/data/kvasir_seg --victim artifacts/kvasir_seg/victim \
        --pretrained artifacts/kvasir_seg/pretrained --out docs/figures/local-credit

Measured as in `benchmarks.estimator_error`. The code is that of the pre-trained autoencoder; it needs cells
(`training.pretrain --autoencoder conv`), else only the image is measured. Writes OUT.json and OUT.png, prints a table.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib import pyplot as plt

from benchmarks import cli
from benchmarks.gradients import MU, Bench, Finding, add_bench_arguments, noisy_images, rge, write
from defense.estimators import LocalGradientEstimator
from services.device import resolve_device
from training.command.errors import UserError
from training.comparison.plots import COLOURS, MARKERS
from training.data.datasets import load_data
from training.fit.pretraining import SANITIZERS, load_pretrained
from training.victim.in_process import in_process

_COUNTS = (4, 16, 64, 256)
_WINDOWS = {"image": (1, 3, 5, 9, 17, 33), "code": (1, 3, 5)}


def findings_at(bench: Bench) -> Iterator[Finding]:
    """RGE, and local credit with windows of several sizes."""
    for count in _COUNTS:
        yield bench.measure(f"RGE, q = {count}", rge(count))
    for window in _WINDOWS[bench.border]:
        for count in _COUNTS:
            estimator = LocalGradientEstimator(count, MU, window)
            yield bench.measure(f"local, {window} x {window}, q = {count}", estimator)


def draw(findings: list[Finding], path: Path) -> None:
    """Draws the cosine with an image's gradient against the queries, a panel a border."""
    borders = list(dict.fromkeys(finding.border for finding in findings))
    figure, panels = plt.subplots(
        1, len(borders), figsize=(6.5 * len(borders), 4.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes, border in zip(panels[0], borders, strict=True):
        families: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.border == border:
                families.setdefault(re.sub(r", q = \d+", "", finding.estimator), []).append(finding)
        for number, (name, members) in enumerate(families.items()):
            axes.plot(
                [finding.queries for finding in members],
                [finding.cosine for finding in members],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="--" if name == "RGE" else "-",
                label=name,
            )
        axes.set(title=f"at the {border}", xlabel="victim queries an image and step", xscale="log", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize="small", title="window in cells")
    panels[0][0].set_ylabel("median cosine with an image's true gradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_bench_arguments(parser, 64, "artifacts/local-credit")
    return cli.run(_run, parser)


def _run(arguments: argparse.Namespace) -> int:
    splits = load_data(cli.data_config(arguments))
    if splits.task != "segmentation":
        raise UserError(f"{splits.name} has no masks: local credit is for segmenters")
    clean, noisy = noisy_images(splits, arguments)
    findings = []
    with in_process(arguments.victim, resolve_device("cpu"), splits) as victim:
        targets = victim(clean).argmax(1)
        for border, name in zip(_WINDOWS, SANITIZERS, strict=True):
            sanitizer = load_pretrained(arguments.pretrained, name, splits, arguments.sigma).requires_grad_(True)
            sanitizer.freeze_decoder()
            if sanitizer.autoencoder is not None and len(sanitizer.autoencoder.code_shape) != 3:
                continue  # a code without cells
            for finding in findings_at(Bench(border, sanitizer, victim, noisy, targets)):
                findings.append(finding)
                print(finding, flush=True)
    write(findings, arguments.out)
    draw(findings, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
