r"""How far every estimator is from the true gradient on a real victim, against the queries it spends.

    python -m benchmarks.estimator_error --data ../shared/data/brain_mri \
        --victim artifacts/brain_mri/victim --pretrained artifacts/brain_mri/pretrained --out docs/figures/estimators

Reads the victim's weights, to know the truth; the estimators do not. Noisy validation images are sanitized, and at the
border of the black box each estimator's gradients are compared with the exact ones: by their cosine (median over the
images on which the victim is unsure: elsewhere there is hardly a gradient), by their squared error, by the error that
the estimator itself announced, and by the cosine of what training applies, the gradient of the parameters averaged over
all images. Writes OUT.json and OUT.png, and prints a table.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from defense.denoisers import WienerUNetDenoiser
from defense.estimators import (
    ControlVariate,
    CoordinateGradientEstimator,
    DecoderTangents,
    Difference,
    Estimator,
    ExactGradient,
    FixedSpan,
    Guided,
    Isotropic,
    Loss,
    RandomGradientEstimator,
    Subspace,
    SurrogateGradient,
    SurrogateSpan,
    low_frequencies,
)
from defense.files import replace_file
from defense.objectives import inject_gradient, stability_loss
from defense.sanitizer import Sanitizer
from defense.surrogates import Surrogate, SurrogateSettings
from services.device import resolve_device
from training import cli, pretrain
from training.datasets import load_data
from training.inprocess import InProcessVictim, in_process
from training.plots import COLOURS, MARKERS
from training.results import align

_RUN = 600 * 64  # images and steps of a whole training run, over which a student's queries are spread
_POINTS = 8192  # evaluated at once


@dataclass(frozen=True)
class Finding:
    """One estimator's figures.

    Attributes:
        border: "image" or "code".
        estimator: Its name.
        queries: Victim queries an image and step; those that trained a student are spread over 600 steps of 64 images.
        cosine: Median cosine with the true gradient over the images on which the victim is unsure.
        error: Squared error relative to the true gradients' squared norm, over all images.
        announced: The error that the estimator announced itself, relative to the same.
        parameter_cosine: Cosine of the parameters' gradient, averaged over all images, with the true one.
    """

    border: str
    estimator: str
    queries: float
    cosine: float
    error: float
    announced: float
    parameter_cosine: float


@dataclass
class Bench:
    """What all estimators are measured on.

    Attributes:
        border: "image" or "code".
        sanitizer: Its parameters are those whose gradient is compared.
        victim: Open, to know the truth.
        noisy: (N, C, H, W) noisy images.
        targets: (N,) the victim's answers on the clean ones.
    """

    border: str
    sanitizer: Sanitizer
    victim: InProcessVictim
    noisy: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        """Takes the true gradients."""
        self.parameters = [p for p in self.sanitizer.parameters() if p.requires_grad]
        with torch.no_grad():
            self.z = self.sanitizer.encode(self.noisy)
            self.confidence = self.victim(self.sanitizer.decode(self.z)).gather(1, self.targets[:, None])[:, 0]
        self.unsure = (self.confidence > 0.02) & (self.confidence < 0.98)
        self.true = self._estimates(ExactGradient(), None, 64)[0]
        self.true_parameters = self._parameter_gradient(self.true)

    def loss(self, part: slice, surrogate: Surrogate | None) -> Loss:
        """The stability loss of some of the images."""
        targets = self.targets[part]

        def black_box(points: Tensor, owners: Tensor) -> Tensor:
            chunks = [self.victim(self.sanitizer.decode(chunk)) for chunk in points.split(512)]
            return stability_loss(torch.cat(chunks), targets[owners], "probabilities")

        if surrogate is None:
            return Loss(black_box)
        return Loss(black_box, lambda points: surrogate.loss(self.sanitizer.decode(points), targets))

    def measure(self, name: str, estimator: Estimator, surrogate: Surrogate | None = None) -> Finding:
        """All figures of one estimator."""
        evaluations = estimator.evaluations(self.z[0].numel())
        size = max(2, min(64, _POINTS // evaluations))
        gradient, announced, spent = self._estimates(estimator, surrogate, size)
        cosine = F.cosine_similarity(gradient.flatten(1), self.true.flatten(1))[self.unsure].median().item()
        energy = self.true.square().sum()
        ours = self._parameter_gradient(gradient)
        paid = 0 if surrogate is None else len(surrogate.values)
        return Finding(
            border=self.border,
            estimator=name,
            queries=spent / len(self.z) + paid / _RUN,
            cosine=cosine,
            error=((gradient - self.true).square().sum() / energy).item(),
            announced=(announced.sum() / energy).item(),
            parameter_cosine=F.cosine_similarity(ours, self.true_parameters, dim=0).item(),
        )

    def _estimates(self, estimator: Estimator, surrogate: Surrogate | None, size: int) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(1)
        gradients, errors, spent = [], [], 0
        for start in range(0, len(self.z), size):
            part = slice(start, start + size)
            estimate = estimator(self.z[part], self.loss(part, surrogate), generator)
            gradients.append(estimate.gradient)
            errors.append(estimate.error)
            spent += estimate.spent
        return torch.cat(gradients), torch.cat(errors), spent

    def _parameter_gradient(self, gradient: Tensor) -> Tensor:
        total = torch.zeros(sum(parameter.numel() for parameter in self.parameters))
        for noisy, part in zip(self.noisy.split(64), gradient.split(64), strict=True):
            scalar = inject_gradient(self.sanitizer.encode(noisy), part) * len(noisy)
            parts = torch.autograd.grad(scalar, self.parameters, allow_unused=True)
            flat = [
                p.new_zeros(p.numel()) if g is None else g.flatten()
                for p, g in zip(self.parameters, parts, strict=True)
            ]
            total += torch.cat(flat)
        return total / len(self.noisy)


def _random(directions: int, **parts: object) -> RandomGradientEstimator:
    return RandomGradientEstimator(directions, mu=0.05, **parts)  # type: ignore[arg-type] # by name, below


def image_estimators(bench: Bench, autoencoder: Sanitizer, surrogates: dict[int, Surrogate]) -> Iterator[Finding]:
    """Those that look at the image."""
    shape = bench.sanitizer.config.input.dimensions
    orthonormal = Isotropic("orthonormal")
    for count in (4, 20, 64, 192, 1024):
        yield bench.measure(f"RGE sphere, q = {count}", _random(count))
    for count in (20, 192):
        yield bench.measure(f"RGE Gaussian, q = {count}", _random(count, where=Isotropic("gaussian")))
        yield bench.measure(f"RGE orthonormal, q = {count}", _random(count, where=orthonormal))
    yield bench.measure("RGE central, q = 20", _random(20, difference="central"))
    for side in (8, 16):
        basis = FixedSpan(low_frequencies(shape, side))
        for count in (4, 16, 64):
            where = Subspace(basis, side * side)
            yield bench.measure(f"DCT {side} x {side}, q = {count}", _random(count, where=where, combine="projection"))
    denoiser = bench.sanitizer.denoiser
    if isinstance(denoiser, WienerUNetDenoiser):
        rows = denoiser.components.basis
        for count in (16, 64):
            where = Subspace(FixedSpan(rows), len(rows))
            yield bench.measure(
                f"{len(rows)} principal components, q = {count}", _random(count, where=where, combine="projection")
            )
    assert autoencoder.autoencoder is not None
    for count in (16, 64):
        tangents = DecoderTangents(autoencoder.autoencoder)
        yield bench.measure(f"decoder tangents, q = {count}", _random(count, where=tangents, combine="projection"))
    for paid, surrogate in surrogates.items():
        title = f"student of {paid:,}"
        yield bench.measure(f"{title}: gradient", SurrogateGradient(0, 0.05), surrogate)
        yield bench.measure(f"{title}: gradient, 16 of 64 checked", SurrogateGradient(16, 0.05), surrogate)
        for count in (1, 4):
            guided = _random(count, where=Guided(orthonormal), combine="projection")
            yield bench.measure(f"{title}: guided, q = {count}", guided, surrogate)
        span = Guided(Subspace(SurrogateSpan(32), 32))
        yield bench.measure(
            f"{title}: guided, span of 32 gradients, q = 4", _random(4, where=span, combine="projection"), surrogate
        )
        dct = Guided(Subspace(FixedSpan(low_frequencies(shape, 8)), 64))
        yield bench.measure(
            f"{title}: guided, DCT 8 x 8, q = 4", _random(4, where=dct, combine="projection"), surrogate
        )
        for count in (4, 20, 192):
            yield bench.measure(
                f"{title}: control variate of RGE, q = {count}", ControlVariate(_random(count)), surrogate
            )
        both = ControlVariate(_random(20, where=orthonormal, combine="projection"))
        yield bench.measure(f"{title}: control variate, projection, q = 20", both, surrogate)


def code_estimators(bench: Bench) -> Iterator[Finding]:
    """Those that look at the code."""
    for count in (4, 20, 64, 192):
        yield bench.measure(f"RGE sphere, q = {count}", _random(count))
    for count in (20, 192):
        yield bench.measure(f"RGE orthonormal, q = {count}", _random(count, where=Isotropic("orthonormal")))
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


def learn_surrogate(bench: Bench, images: Tensor, queries: int, steps: int, sigma: float, seed: int) -> Surrogate:
    """A student of the victim's answers on `queries` sanitized noisy training images."""
    generator = torch.Generator().manual_seed(seed)
    settings = SurrogateSettings(warm_up=queries, warm_up_steps=steps)
    shape = bench.sanitizer.config.input.dimensions
    surrogate = Surrogate(shape, bench.victim(images[:1]).shape[1], settings, seed, images.device)
    with torch.no_grad():
        while len(surrogate.values) < queries:
            size = min(512, queries - len(surrogate.values))
            clean = images[torch.randint(len(images), (size,), generator=generator)]
            sanitized = bench.sanitizer(clean + sigma * torch.randn(clean.shape, generator=generator))
            surrogate.observe(sanitized, bench.victim(sanitized), "probabilities")
    surrogate.learn(steps, from_scratch=True)
    return surrogate


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    parser.add_argument("--victim", type=Path, required=True, help="what training.victim_fit wrote")
    parser.add_argument("--pretrained", type=Path, required=True, help="what training.pretrain wrote")
    parser.add_argument("--images", type=cli.positive_int, default=256, help="validation images (default 256)")
    parser.add_argument("--sigma", type=cli.positive_float, default=0.25, help="of the noise (default 0.25)")
    parser.add_argument("--student-steps", type=cli.positive_int, default=2400, help="of each student (default 2400)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/estimators"), help="stem of the files")
    return cli.run(_run, parser)


def _run(arguments: argparse.Namespace) -> int:
    splits = load_data(arguments)
    parts = {
        name: pretrain.load(arguments.pretrained, name, splits, arguments.sigma).requires_grad_(True)
        for name in pretrain.SANITIZERS
    }
    for part in parts.values():
        part.freeze_decoder()
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = torch.randperm(len(splits.validation.images), generator=generator)[: arguments.images]
    clean = splits.validation.images[chosen]
    noisy = clean + arguments.sigma * torch.randn(clean.shape, generator=generator)
    findings: list[Finding] = []
    with in_process(arguments.victim, resolve_device("cpu"), splits) as victim:
        targets = victim(clean).argmax(1)
        image = Bench("image", parts["denoiser"], victim, noisy, targets)
        print(f"{len(clean)} images, {int(image.unsure.sum())} of them unsure", flush=True)
        surrogates = {
            queries: learn_surrogate(
                image, splits.train.images, queries, arguments.student_steps, arguments.sigma, arguments.seed
            )
            for queries in (5_000, 20_000)
        }
        code = Bench("code", parts["denoiser+autoencoder"], victim, noisy, targets)
        for finding in (*image_estimators(image, parts["denoiser+autoencoder"], surrogates), *code_estimators(code)):
            findings.append(finding)
            print(finding, flush=True)
    replace_file(
        arguments.out.with_suffix(".json"), (json.dumps([asdict(f) for f in findings], indent=1) + "\n").encode()
    )
    draw(findings, arguments.out.with_suffix(".png"))
    head = ("border", "estimator", "queries", "cosine", "error", "announced", "parameter cosine")
    body = [
        (
            f.border,
            f.estimator,
            f"{f.queries:.2f}",
            f"{f.cosine:.3f}",
            f"{f.error:.3g}",
            f"{f.announced:.3g}",
            f"{f.parameter_cosine:.3f}",
        )
        for f in findings
    ]
    print(align([head, *body], left=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
