"""The bench on which gradient estimators are compared with the truth, which an open victim gives."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cli
from defense.estimators import Estimator, ExactGradient, Loss, Points, RandomGradientEstimator
from defense.files import replace_file
from defense.objectives import inject_gradient, located_loss, stability_loss
from defense.sanitizer import Sanitizer
from defense.surrogates import Surrogate, SurrogateSettings
from training.data.datasets import Splits
from training.measure.results import align
from training.victim.in_process import InProcessVictim

MU: Final = 0.05
"""Step of all differences, in L2 norm."""

RUN: Final = 600 * 64
"""Images and steps of a whole training run, over which a student's queries are spread."""

_POINTS = 8192  # evaluated at once


@dataclass(frozen=True)
class Finding:
    """One estimator's figures.

    Attributes:
        border: "image" or "code".
        queries: Victim queries an image and step; those that trained a student are spread over 600 steps of 64 images.
        cosine: Median cosine with the true gradient over the images on which the victim is unsure; of masks, over all.
        error: Squared error relative to the true gradients' squared norm, over all images.
        parameter_cosine: Cosine of the parameters' gradient, averaged over all images, with the true one.
    """

    border: str
    estimator: str
    queries: float
    cosine: float
    error: float
    parameter_cosine: float


@dataclass
class Bench:
    """What all estimators are measured on.

    Attributes:
        border: "image" or "code".
        noisy: (N, C, H, W) noisy images.
        targets: (N,) or (N, H, W) the open victim's answers on the clean ones.
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
            scores = self.victim(self.sanitizer.decode(self.z))
        self.unsure = torch.ones(len(self.z), dtype=torch.bool)
        if self.targets.ndim == 1:  # where the victim is sure there is hardly a gradient
            confidence = scores.gather(1, self.targets[:, None])[:, 0]
            self.unsure = (confidence > 0.02) & (confidence < 0.98)
        self.true = self._estimates(ExactGradient(), None, 64)[0]
        self.true_parameters = self._parameter_gradient(self.true)

    def loss(self, part: slice, surrogate: Surrogate | None) -> Loss:
        """The stability loss of some of the images."""
        targets = self.targets[part]

        def answers(points: Points) -> Tensor:
            return torch.cat([self.victim(self.sanitizer.decode(chunk)) for chunk in points.z.split(512)])

        def black_box(points: Points) -> Tensor:
            return stability_loss(answers(points), targets[points.owners], "probabilities")

        def located(points: Points) -> Tensor:
            scores = answers(points)
            around = scores[points.centers][points.owners]
            return located_loss(scores, targets[points.owners], "probabilities", around)

        known = None if surrogate is None else lambda points: surrogate.loss(self.sanitizer.decode(points), targets)
        return Loss(black_box, known, located if targets.ndim > 1 else None)

    def measure(self, name: str, estimator: Estimator, surrogate: Surrogate | None = None) -> Finding:
        """All figures of one estimator."""
        evaluations = estimator.evaluations(self.z[0].numel())
        size = max(2, min(64, _POINTS // evaluations))
        gradient, spent = self._estimates(estimator, surrogate, size)
        cosine = F.cosine_similarity(gradient.flatten(1), self.true.flatten(1))[self.unsure].median().item()
        energy = self.true.square().sum()
        ours = self._parameter_gradient(gradient)
        paid = 0 if surrogate is None else len(surrogate.values)
        return Finding(
            border=self.border,
            estimator=name,
            queries=spent / len(self.z) + paid / RUN,
            cosine=cosine,
            error=((gradient - self.true).square().sum() / energy).item(),
            parameter_cosine=F.cosine_similarity(ours, self.true_parameters, dim=0).item(),
        )

    def _estimates(self, estimator: Estimator, surrogate: Surrogate | None, size: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(1)
        gradients, spent = [], 0
        for start in range(0, len(self.z), size):
            part = slice(start, start + size)
            estimate = estimator(self.z[part], self.loss(part, surrogate), generator)
            gradients.append(estimate.gradient)
            spent += estimate.spent
        return torch.cat(gradients), spent

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


def add_bench_arguments(parser: argparse.ArgumentParser, images: int, out: str) -> None:
    """Adds what is measured, on `images` images by default, and where the figures go."""
    cli.add_data_arguments(parser)
    add = parser.add_argument
    add("--victim", type=Path, required=True, help="what training.victim_fit wrote")
    add("--pretrained", type=Path, required=True, help="what training.pretrain wrote")
    add("--images", type=cli.positive_int, default=images, help=f"validation images (default {images})")
    add("--sigma", type=cli.positive_float, default=0.25, help="of the noise (default 0.25)")
    add("--out", type=Path, default=Path(out), help="stem of the files")


def noisy_images(splits: Splits, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random validation images (N, C, H, W), as `add_bench_arguments` has them, clean and noisy."""
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = torch.randperm(len(splits.validation.images), generator=generator)[: arguments.images]
    clean = splits.validation.images[chosen]
    return clean, clean + arguments.sigma * torch.randn(clean.shape, generator=generator)


def rge(directions: int, **parts: object) -> RandomGradientEstimator:
    """RGE at the bench's step, with these parts."""
    return RandomGradientEstimator(directions, mu=MU, **parts)  # type: ignore[arg-type] # by name


def learn_surrogate(bench: Bench, images: Tensor, queries: int, steps: int, sigma: float, seed: int) -> Surrogate:
    """A student of the victim's answers on `queries` sanitized noisy training images."""
    generator = torch.Generator().manual_seed(seed)
    settings = SurrogateSettings(warm_up=queries, warm_up_steps=steps)
    shape = bench.sanitizer.config.input.dimensions
    classes, *positions = bench.victim(images[:1]).shape[1:]
    surrogate = Surrogate(shape, classes, settings, seed, images.device, tuple(positions))
    with torch.no_grad():
        while len(surrogate.values) < queries:
            size = min(512, queries - len(surrogate.values))
            clean = images[torch.randint(len(images), (size,), generator=generator)]
            sanitized = bench.sanitizer(clean + sigma * torch.randn(clean.shape, generator=generator))
            surrogate.observe(sanitized, bench.victim(sanitized), "probabilities")
    surrogate.learn(steps, from_scratch=True)
    return surrogate


def write(findings: Sequence[Finding], stem: Path) -> None:
    """Writes STEM.json, and prints a table."""
    replace_file(stem.with_suffix(".json"), (json.dumps([asdict(f) for f in findings], indent=1) + "\n").encode())
    head = ("border", "estimator", "queries", "cosine", "error", "parameter cosine")
    body = [
        (
            f.border,
            f.estimator,
            f"{f.queries:.2f}",
            f"{f.cosine:.3f}",
            f"{f.error:.3g}",
            f"{f.parameter_cosine:.3f}",
        )
        for f in findings
    ]
    print(align([head, *body], left=2))
