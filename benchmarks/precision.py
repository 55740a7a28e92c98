"""What a victim's precision leaves of finite differences: the probe's verdict, and how far true slopes confirm it.

    python -m benchmarks.precision --model artifacts/brain_mri/victim --data ../shared/data/brain_mri \
        --artifact artifacts/brain_mri/pretrained/denoiser \
        --artifact artifacts/brain_mri/pretrained/denoiser+autoencoder

The victim runs in process and answers in five ways: float32 tensors, 8-bit PNG, probabilities rounded to 4 and to 2
digits, and the shares of 16 votes over its labels. The probe looks at 32 noisy training images, as `zo_fit` does, with
several seeds. The true slopes, along one random direction at each of many other images, come from automatic
differentiation of the unrounded answers.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import cli
from defense.artifact import load_artifact
from defense.difference_table import PUBLISHED_MU
from defense.estimators import sample_directions
from defense.noise_floor import ProbeReport, probe
from defense.objectives import stability_loss
from defense.sanitizer import Sanitizer
from defense.victims import MeteredVictim, QueryLedger, Victim
from defense.votes import VotingVictim
from services.hospital.model import load_victim
from services.protocol.images import decode_image, encode_png
from training.data.datasets import load_data

_PROBE_IMAGES = 32
_CHUNK = 256


@dataclass(frozen=True)
class _Points:
    """Where slopes are measured.

    Attributes:
        clean: (N, C, H, W) images.
        z: (N, *shape) at the border, from noisy copies of them.
    """

    clean: Tensor
    z: Tensor


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    parser.add_argument("--model", type=Path, required=True, help="folder of the victim")
    parser.add_argument(
        "--artifact", type=Path, action="append", required=True, help="pre-trained sanitizer; repeat it"
    )
    parser.add_argument("--sigma", type=cli.positive_float, default=0.25, help="noise on the images (default 0.25)")
    parser.add_argument("--slopes", type=cli.positive_int, default=512, help="true slopes (default 512)")
    parser.add_argument("--probes", type=cli.positive_int, default=8, help="of each victim (default 8)")
    parser.add_argument("--votes", type=cli.positive_int, default=16, help="V (default 16)")
    parser.add_argument("--vote-noise", type=cli.non_negative_float, default=0.1, help="tau (default 0.1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(_measure, build_parser(), argv)


def _measure(arguments: argparse.Namespace) -> int:
    model, config = load_victim(arguments.model)
    model.requires_grad_(False)
    images = load_data(cli.data_config(arguments)).train.images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
    tested = images[order[: arguments.slopes]]
    probed = images[order[arguments.slopes :]]
    print("| border | answers | s | resolved | mu | error | r at 0.005 | r at mu | best r, at |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in arguments.artifact:
        sanitizer = load_artifact(folder).sanitizer.eval()
        points = _points(sanitizer, tested, arguments.sigma, arguments.seed)
        directions, true = _true_slopes(model, sanitizer, points, arguments.seed)
        for name, make in _victims(model, config.channels, arguments).items():
            reports = []
            for seed in range(arguments.probes):
                sample = probed[seed * _PROBE_IMAGES : (seed + 1) * _PROBE_IMAGES]
                reports.append(_probed(make(), sanitizer, sample, arguments.sigma, seed))
            measure = partial(_correlation, make, reports[0], sanitizer, points, directions, true)
            grid = {one.mu: measure(one.mu) for one in reports[0].spacings}
            print(_row(folder.name, name, reports, grid, measure), flush=True)
    return 0


def _victims(model: nn.Module, channels: int, arguments: argparse.Namespace) -> dict[str, Callable[[], MeteredVictim]]:
    @torch.inference_mode()
    def exact(images: Tensor) -> Tensor:
        return torch.cat([model(part).softmax(1) for part in images.split(_CHUNK)])

    def eight_bits(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        travelled = [decode_image(encode_png(one.numpy()), channels=channels, size=(height, width)) for one in images]
        return exact(torch.stack([torch.from_numpy(one) for one in travelled]))

    def rounded(images: Tensor, digits: int) -> Tensor:
        return torch.round(exact(images), decimals=digits)

    def plain(victim: Victim) -> MeteredVictim:
        return MeteredVictim(victim, QueryLedger())

    def votes() -> MeteredVictim:
        voting = VotingVictim(exact, arguments.votes, arguments.vote_noise, arguments.seed)
        return MeteredVictim(voting, QueryLedger(), queries_per_image=arguments.votes)

    return {
        "float32 tensors": lambda: plain(exact),
        "8-bit PNG": lambda: plain(eight_bits),
        "rounded to 4 digits": lambda: plain(partial(rounded, digits=4)),
        "rounded to 2 digits": lambda: plain(partial(rounded, digits=2)),
        f"labels, {arguments.votes} votes (tau {arguments.vote_noise:g})": votes,
    }


@torch.no_grad()
def _points(sanitizer: Sanitizer, clean: Tensor, sigma: float, seed: int) -> _Points:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    noisy = clean + sigma * noise
    return _Points(clean, torch.cat([sanitizer.encode(part) for part in noisy.split(_CHUNK)]))


def _true_slopes(model: nn.Module, sanitizer: Sanitizer, points: _Points, seed: int) -> tuple[Tensor, Tensor]:
    """(N, *shape) unit directions, one for each point, and the (N,) derivatives of the stability loss along them."""
    z = points.z
    drawn = sample_directions(len(z), 1, z[0].numel(), "sphere", torch.Generator().manual_seed(seed + 1))
    directions = drawn.view_as(z)
    slopes = []
    for clean, at, along in zip(*(whole.split(_CHUNK) for whole in (points.clean, z, directions)), strict=True):
        targets = model(clean).argmax(1)
        variable = at.clone().requires_grad_(True)
        loss = stability_loss(model(sanitizer.decode(variable)), targets, "logits").sum()
        (gradient,) = torch.autograd.grad(loss, variable)
        slopes.append((gradient * along).flatten(1).sum(1))
    return directions, torch.cat(slopes)


@torch.no_grad()
def _probed(victim: MeteredVictim, sanitizer: Sanitizer, clean: Tensor, sigma: float, seed: int) -> ProbeReport:
    generator = torch.Generator().manual_seed(seed)
    z = sanitizer.encode(clean + sigma * torch.randn(clean.shape, generator=generator))
    return probe(victim, clean, z, sanitizer.decode, generator)


@torch.no_grad()
def _correlation(
    make: Callable[[], MeteredVictim],
    report: ProbeReport,
    sanitizer: Sanitizer,
    points: _Points,
    directions: Tensor,
    true: Tensor,
    mu: float,
) -> float:
    """Of forward differences with the true slopes; 0 where no difference moves."""
    victim = make()
    targets = victim.query(points.clean, "targets").argmax(1)
    victim.kind, victim.rounding = report.kind, report.rounding
    both = torch.cat([points.z, points.z + mu * directions])
    losses = stability_loss(victim.query(sanitizer.decode(both), "slopes"), targets.repeat(2), report.kind)
    measured = losses[len(true) :] - losses[: len(true)]
    if not measured.any():
        return 0.0
    return torch.corrcoef(torch.stack([measured, true]))[0, 1].item()


def _row(
    border: str,
    name: str,
    reports: list[ProbeReport],
    grid: dict[float, float],
    measure: Callable[[float], float],
) -> str:
    resolved = [one for one in reports if one.is_resolved]
    noise = statistics.median(one.noise for one in reports)
    best = max(grid, key=lambda mu: grid[mu])
    shown = resolved or reports
    error = statistics.median(one.deciding.error(one.difference) for one in shown)
    if resolved:
        mu = statistics.median(one.mu for one in resolved)
        steps = [one.mu for one in resolved]
        chosen, at_mu = f"{mu:.2g} ({min(steps):.2g} to {max(steps):.2g})", f"{measure(mu):.2f}"
    else:
        chosen, at_mu = "refused", "-"
    cells = (
        border,
        name,
        f"{noise:.0e}",
        f"{len(resolved)} of {len(reports)}",
        chosen,
        f"{error:.2f}",
        f"{grid[PUBLISHED_MU]:.2f}",
        at_mu,
        f"{grid[best]:.2f}, {best:g}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
