r"""Attacks a defence as somebody would who has all of it: the artifact, the victim's weights, and what the noise is.

    python -m training.redteam --data phantom --victim artifacts/phantom/victim --artifact artifacts/phantom/zo-ds
    python -m training.redteam --data DIR --victim DIR --artifact DIR --votes 20      # the smoothed model, by EOT

At every size each image is attacked in several ways, and counts as lost if any of them succeeds (the per-image worst
case): PGD with the exact gradient through sanitizer and victim, from two random starts, the second with twice the
steps; PGD whose gradient passes the sanitizer as if it did nothing (BPDA); and PGD made for the bare victim (transfer).
DDN looks for the smallest L2 change. With --votes the defence is the majority of so many noisy copies, and gradients
are means over --eot fresh ones.

It ends with checks of the attacks themselves: an attack that fails them says nothing about the defence. Rows go to
--results; the attack `adaptive` is the worst case. Validation images, unless --split test.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from defense.adaptive import Defended, Smoothed
from defense.artifact import load_artifact
from defense.attacks import craft, minimum_norms
from services.device import resolve_device
from training.cli import UserError, add_device_argument, non_negative_int, positive_int, run
from training.datasets import load_data
from training.inprocess import in_process
from training.measuring import CHUNK, add_measuring_arguments, chosen_images, defence_name, number_list
from training.results import Row, align, bootstrap_interval, finite, write_rows
from training.scoring import main_metric, main_score

logger = logging.getLogger(__name__)

WORST_CASE: Final = "adaptive"
"""The attack, in the results, of which each image's score is the least of all of them."""

_SURE: Final = 128 / 255
"""A change with which any image can be made any other's: here an attack that works has to succeed."""

_SLACK: Final = 0.02
"""By how much shares of images may differ before a check fails."""


class Attacker:
    """Everything that is attacked, and how.

    Args:
        sanitizer: Of the artifact.
        victim: The weights behind it, logits.
        sigma: Of the noise, where copies vote.
        votes: How many copies vote; 0: one pass without noise.
        eot: Copies over which a gradient is averaged.
        seed: Of random starts and noise.
    """

    def __init__(
        self, sanitizer: nn.Module, victim: nn.Module, *, sigma: float, votes: int, eot: int, seed: int
    ) -> None:
        self.victim = victim
        self.seed = seed
        self._sigma, self._votes = sigma, votes
        self._pipeline = Defended(sanitizer, victim).eval()
        through = Defended(sanitizer, victim, identity_backward=True).eval()
        self.models: Mapping[str, nn.Module] = {
            "exact": Smoothed(self._pipeline, sigma, eot).eval() if votes else self._pipeline,
            "bpda": Smoothed(through, sigma, eot).eval() if votes else through,
            "transfer": victim,
        }

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """What the defence answers: (N,) classes or (N,H,W) masks."""
        if not self._votes:
            return torch.cat([self._pipeline(part).argmax(1) for part in images.split(CHUNK)])
        source = torch.Generator().manual_seed(self.seed)
        counts: Tensor | int = 0
        for _ in range(self._votes):
            noisy = images + self._sigma * torch.randn(images.shape, generator=source).to(images.device)
            scores = torch.cat([self._pipeline(part) for part in noisy.split(CHUNK)])
            counts = counts + nn.functional.one_hot(scores.argmax(1), scores.shape[1])
        assert isinstance(counts, Tensor)
        return counts.argmax(-1)

    def attacks(self, norm: str, images: Tensor, labels: Tensor, epsilon: float, steps: int) -> dict[str, Tensor]:
        """The attacked images (N,C,H,W) of every attack at one size."""
        name = "pgd" if norm == "linf" else "pgd-l2"
        batch = 128 if not self._votes else 16

        def pgd(model: str, steps: int, seed: int) -> Tensor:
            return craft(name, self.models[model], images, labels, epsilon, steps=steps, seed=seed, batch=batch)

        made = {
            "pgd": pgd("exact", steps, self.seed),
            "pgd-twice": pgd("exact", 2 * steps, self.seed + 1),
            "pgd-bpda": pgd("bpda", steps, self.seed),
            "pgd-transfer": pgd("transfer", steps, self.seed),
        }
        if norm == "linf":
            made["fgsm"] = craft("fgsm", self.models["exact"], images, labels, epsilon, seed=self.seed, batch=batch)
        return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb."""
    return run(_attack, build_parser(), argv)


def _attack(arguments: argparse.Namespace) -> int:
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    _, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    artifact = load_artifact(arguments.artifact)
    if tuple(chosen.images.shape[1:]) != artifact.manifest.input.dimensions:
        raise UserError(f"{arguments.artifact} takes other images: use its --size and --channels")
    images, labels = chosen.images.to(device), chosen.labels.to(device)
    with in_process(arguments.victim, device, splits) as victim:
        sanitizer = artifact.sanitizer.to(device).eval().requires_grad_(False)
        attacker = Attacker(
            sanitizer,
            victim.model,
            sigma=artifact.manifest.sigma,
            votes=arguments.votes,
            eot=arguments.eot,
            seed=arguments.seed,
        )
        metric = main_metric(labels)
        name = arguments.name or artifact.manifest.name

        def row(attack: str, norm: str, epsilon: float | None, metric: str, values: Tensor) -> Row:
            array = values.double().cpu().numpy()
            middle = np.median if metric.startswith("median") else np.mean
            low, high = bootstrap_interval(array, lambda drawn: middle(drawn, axis=1), seed=arguments.seed)
            value = float(middle(array))
            return Row(
                dataset=splits.name,
                task=splits.task,
                split=arguments.split,
                attack=attack,
                norm=norm,
                epsilon=epsilon,
                defence=name,
                metric=metric,
                value=finite(value),
                n=len(array),
                queries=artifact.manifest.queries_spent,
                seed=arguments.seed,
                low=finite(low),
                high=finite(high),
            )

        clean = main_score(attacker.answers(images), labels)
        rows = [row("none", "none", None, metric, clean)]
        table, means = [["norm", "size", "fgsm", "pgd", "twice", "bpda", "transfer", "worst"]], {}
        sizes = [("linf", size / 255) for size in arguments.epsilons_linf]
        sizes += [("l2", size) for size in arguments.epsilons_l2]
        for norm, epsilon in [*sizes, ("linf", _SURE)]:
            made = attacker.attacks(norm, images, labels, epsilon, arguments.steps)
            scored = {attack: main_score(attacker.answers(shown), labels) for attack, shown in made.items()}
            worst = torch.stack([clean, *scored.values()]).amin(0)
            means[norm, epsilon] = {attack: float(values.mean()) for attack, values in scored.items()}
            means[norm, epsilon]["worst"] = float(worst.mean())
            rows += [row(f"adaptive-{attack}", norm, epsilon, metric, values) for attack, values in scored.items()]
            rows.append(row(WORST_CASE, norm, epsilon, metric, worst))
            size = f"{255 * epsilon:g}/255" if norm == "linf" else f"{epsilon:g}"
            shown = ["fgsm", "pgd", "pgd-twice", "pgd-bpda", "pgd-transfer", "worst"]
            cells = [f"{100 * means[norm, epsilon][one]:.1f}" if one in means[norm, epsilon] else "-" for one in shown]
            table.append([norm, size, *cells])
            logger.info("%s %s: worst case %s %.1f%%", norm, size, metric, 100 * means[norm, epsilon]["worst"])
        if not arguments.votes:  # of a random answer there is no smallest change
            crafted = craft("ddn", attacker.models["exact"], images, labels, seed=arguments.seed)
            norms = minimum_norms(attacker.models["exact"], images, crafted, labels).cpu()
            if (right := norms > 0).any():
                rows.append(row("adaptive-ddn", "l2", None, "median_l2", norms[right]))
                print(f"DDN on the whole pipeline: median L2 norm {norms[right].median().item():.3f}")
    write_rows(arguments.results, rows)
    what = f"majority of {arguments.votes} copies, EOT over {arguments.eot}" if arguments.votes else "one pass"
    print(f"{name} on {splits.name}, {arguments.split}, {len(chosen)} images; {what}; {metric}, in %")
    print(f"clean {100 * float(clean.mean()):.1f}")
    print(align(table, left=2))
    for told in checks(means):
        print(told)
    print(f"Rows added to {arguments.results}")
    return 0


def checks(means: Mapping[tuple[str, float], Mapping[str, float]]) -> list[str]:
    """What is wrong with the attacks, or that nothing is, a line a check.

    Args:
        means: The mean scores by (norm, size) and attack.
    """
    found = []

    def check(what: str, failures: list[str]) -> None:
        found.append(f"check: {what}: " + ("holds" if not failures else "FAILS at " + "; ".join(failures)))

    def at(key: tuple[str, float], left: float, right: float) -> str:
        size = f"{255 * key[1]:g}/255" if key[0] == "linf" else f"{key[1]:g}"
        return f"{key[0]} {size} ({100 * left:.1f} against {100 * right:.1f})"

    check(
        "many steps are not weaker than one",
        [at(key, one["pgd"], one["fgsm"]) for key, one in means.items() if one["pgd"] > one.get("fgsm", 1) + _SLACK],
    )
    check(
        "twice the steps and another start change little",
        [
            at(key, one["pgd"], one["pgd-twice"])
            for key, one in means.items()
            if one["pgd"] - one["pgd-twice"] > _SLACK and key[1] < _SURE
        ],
    )
    check(
        "who sees no gradients of the defence is not better than who does",
        [
            at(key, one["pgd-transfer"], one["pgd"])
            for key, one in means.items()
            if one["pgd-transfer"] < one["pgd"] - _SLACK
        ],
    )
    rising = []
    for norm in ("linf", "l2"):
        sizes = sorted(size for kind, size in means if kind == norm)
        for small, large in pairwise(sizes):
            if means[norm, large]["worst"] > means[norm, small]["worst"] + _SLACK:
                rising.append(at((norm, large), means[norm, large]["worst"], means[norm, small]["worst"]))
    check("larger changes are not less successful", rising)
    sure = means["linf", _SURE]["worst"]
    check("a change of half the range always succeeds", [at(("linf", _SURE), sure, 0.0)] if sure > _SLACK else [])
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.redteam", description="Attacks a defence adaptively.")
    add_measuring_arguments(parser)
    add_device_argument(parser)
    parser.set_defaults(split="validation")
    parser.add_argument("--victim", type=Path, required=True, help="the model's weights, as training.victim_fit wrote")
    parser.add_argument("--artifact", type=Path, required=True, help="the sanitizer")
    parser.add_argument("--name", type=defence_name, help="of the defence in the results (default the artifact's)")
    parser.add_argument(
        "--epsilons-linf", type=number_list, default=[0.5, 1.0, 2.0, 4.0, 8.0], help="in 1/255 (0.5,1,2,4,8)"
    )
    parser.add_argument("--epsilons-l2", type=number_list, default=[0.25, 0.5, 1.0, 2.0], help="(0.25,0.5,1,2)")
    parser.add_argument("--steps", type=positive_int, default=40, help="of PGD (default 40)")
    parser.add_argument(
        "--votes", type=non_negative_int, default=0, help="noisy copies that vote (default 0: one pass, no noise)"
    )
    parser.add_argument("--eot", type=positive_int, default=20, help="noisy copies a gradient (default 20)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
