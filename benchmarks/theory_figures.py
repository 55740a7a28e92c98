"""The figures of docs/theory.md: what the project's estimators do on analytic losses, beside what the formulae say.

    python -m benchmarks.theory_figures --out docs/figures

Lines are predictions; marks are means over many draws of the estimators. It takes half a minute.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cli
from defense.estimators import (
    Combination,
    CoordinateGradientEstimator,
    Difference,
    Estimator,
    Isotropic,
    Loss,
    Points,
    RandomGradientEstimator,
    Sampling,
)

DIMENSION = 192  # the code of the paper
DRAWS = 400

# Okabe and Ito's palette, told apart by colour-blind readers; each series has a mark of its own as well.
ORANGE, BLUE, GREEN, PURPLE, BLACK = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000"

Series = tuple[str, Sampling, Combination, str, str]

SERIES: list[Series] = [
    ("sphere", "sphere", "unbiased", BLUE, "o"),
    ("Gaussian", "gaussian", "unbiased", ORANGE, "x"),
    ("orthonormal", "orthonormal", "unbiased", GREEN, "s"),
    ("orthonormal, projection", "orthonormal", "projection", PURPLE, "^"),
]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.theory_figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(_draw_all, build_parser(), argv)


def _draw_all(arguments: argparse.Namespace) -> int:
    arguments.out.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figures = {"directions": draw_directions, "step": draw_step, "control-variate": draw_control_variate}
    for name, draw in figures.items():
        figure = draw()
        path = arguments.out / f"{name}.png"
        # Without the date and the version, the same numbers make the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    return 0


def draw_directions() -> Figure:
    """Formulae 2 and 3: relative squared error and cosine against the number of directions."""
    gradient = torch.randn(DIMENSION, generator=torch.Generator().manual_seed(0))
    counts = [1, 2, 5, 10, 20, 50, 100, 150, 190]
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, sampling, combine, colour, mark in SERIES:
        errors, cosines = [], []
        for count in counts:
            estimator = RandomGradientEstimator(count, 0.1, Isotropic(sampling), combine=combine)
            found = _estimates(estimator, _linear(gradient))
            errors.append(((found - gradient).square().sum(1).mean() / gradient.square().sum()).item())
            cosines.append(torch.cosine_similarity(found, gradient[None]).mean().item())
        smooth = torch.logspace(0, math.log10(191.5), 200).tolist()
        left.plot(smooth, [_error(q, sampling, combine) for q in smooth], color=colour, linewidth=1)
        left.plot(counts, errors, mark, color=colour, markersize=5, fillstyle="none", label=label)
        if combine == "unbiased":  # the factor between the two changes no cosine
            right.plot(smooth, [_cosine(q, sampling) for q in smooth], color=colour, linewidth=1)
            right.plot(counts, cosines, mark, color=colour, markersize=5, fillstyle="none")
    left.set(xscale="log", yscale="log", xlabel="directions q", ylabel="squared error / |g|²", ylim=(5e-3, 300))
    right.set(xscale="log", xlabel="directions q", ylabel="mean cosine with g", ylim=(0, 1.04))
    left.legend(loc="lower left")
    left.set_title(f"error, d = {DIMENSION}", fontsize=9)
    right.set_title("cosine: √(q/(q+d−1)) and √(q/d)", fontsize=9)
    return figure


def draw_step() -> Figure:
    """Formula 5: total error of CGE against the step, on a loss with second and third derivatives and noise."""
    dimension, second, third, noise = 32, 1.0, 1.0, 1e-3
    source = torch.Generator().manual_seed(1)

    def black_box(points: Points) -> Tensor:
        exact = (second / 2 * points.z.square() + third / 6 * points.z**3).sum(1)
        return exact + noise * torch.randn(len(exact), generator=source)

    predictions: dict[Difference, tuple[Callable[[float], float], float, str, str]] = {
        "forward": (
            lambda mu: dimension * ((mu * second / 2 + mu**2 * third / 6) ** 2 + 2 * noise**2 / mu**2),
            (8 * noise**2 / second**2) ** 0.25,
            BLUE,
            "o",
        ),
        "central": (
            lambda mu: dimension * (mu**4 * third**2 / 36 + noise**2 / (2 * mu**2)),
            (3 * noise / third) ** (1 / 3),
            ORANGE,
            "s",
        ),
    }
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    smooth = torch.logspace(-2.6, 0, 200).tolist()
    for difference, (predicted, best, colour, mark) in predictions.items():
        steps = torch.logspace(-2.5, 0, 11).tolist()
        errors = [
            _estimates(CoordinateGradientEstimator(mu, difference), Loss(black_box), dimension).square().sum(1).mean()
            for mu in steps
        ]
        axes.plot(smooth, [predicted(mu) for mu in smooth], color=colour, linewidth=1)
        axes.plot(
            steps, torch.stack(errors).tolist(), mark, color=colour, fillstyle="none", markersize=5, label=difference
        )
        axes.axvline(best, ymax=0.84, color=colour, linewidth=1, linestyle="--")
        name = r"(8s^2/L^2)^{1/4}" if difference == "forward" else r"(3s/\rho)^{1/3}"
        side: Literal["left", "right"] = "right" if difference == "forward" else "left"
        axes.text(best, 100, f"best $\\mu = {name} = {best:.3f}$", color=colour, ha=side, fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="step μ", ylabel="squared error")
    axes.set_ylim(5e-4, 300)
    axes.set_title(f"CGE, d = {dimension}, L = ρ = 1, noise s = {noise}", fontsize=9)
    axes.legend(loc="lower left")
    return figure


def draw_control_variate() -> Figure:
    """Formula 6: what a surrogate of cosine c leaves of the error, as control variate and alone, at the best factor."""
    count = 20
    generator = torch.Generator().manual_seed(0)
    along = F.normalize(torch.randn(DIMENSION, generator=generator), dim=0)
    other = torch.randn(DIMENSION, generator=generator)
    other = F.normalize(other - (other @ along) * along, dim=0)
    inner = RandomGradientEstimator(count, 0.1)
    projected = RandomGradientEstimator(count, 0.1, Isotropic("orthonormal"), combine="projection")
    series: list[tuple[str, Estimator | None, float, str, str]] = [
        ("control variate, unbiased", inner, (DIMENSION - 1) / count, BLUE, "o"),
        ("surrogate's gradient alone", None, 1.0, BLACK, "x"),
        ("control variate, projection", projected, 1 - count / DIMENSION, PURPLE, "^"),
    ]
    cosines = [0.1 * step for step in range(1, 10)] + [0.97]
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    smooth = torch.linspace(0, 0.985, 200).tolist()
    for label, estimator, plain, colour, mark in series:
        errors = []
        for cosine in cosines:
            best = cosine * (cosine * along + math.sqrt(1 - cosine**2) * other)  # beta h
            found = best if estimator is None else best + _estimates(estimator, _linear(along - best))
            errors.append((found - along).square().sum(-1).mean().item())
        axes.plot(smooth, [plain * (1 - cosine**2) for cosine in smooth], color=colour, linewidth=1)
        axes.plot(cosines, errors, mark, color=colour, fillstyle="none", markersize=5, label=label)
    axes.axhline((DIMENSION - 1) / count, color="0.6", linewidth=1, linestyle=":")
    axes.text(0.55, (DIMENSION - 1) / count * 1.1, "RGE without a surrogate", color="0.4", fontsize=8)
    axes.set(yscale="log", xlabel="cosine c of surrogate and true gradient", ylabel="squared error / |g|²")
    axes.set_ylim(0.02, 20)
    axes.set_title(f"d = {DIMENSION}, q = {count}: (1 − c²) of each", fontsize=9)
    axes.legend(loc="lower left")
    return figure


def _linear(gradient: Tensor) -> Loss:
    return Loss(lambda points: points.z @ gradient)


def _estimates(estimator: Estimator, loss: Loss, dimension: int = DIMENSION) -> Tensor:
    """(DRAWS, d) estimates at the origin."""
    return estimator(torch.zeros(DRAWS, dimension), loss, torch.Generator().manual_seed(2)).gradient


def _error(count: float, sampling: Sampling, combine: Combination) -> float:
    """Formulae 2 and 3; `count` need not be whole."""
    if combine == "projection":
        return 1 - count / DIMENSION
    match sampling:
        case "sphere":
            return (DIMENSION - 1) / count
        case "gaussian":
            return (DIMENSION + 1) / count
        case "orthonormal":
            return DIMENSION / count - 1


def _cosine(count: float, sampling: Sampling) -> float:
    return math.sqrt(count / DIMENSION) if sampling == "orthonormal" else math.sqrt(count / (count + DIMENSION - 1))


if __name__ == "__main__":
    sys.exit(main())
