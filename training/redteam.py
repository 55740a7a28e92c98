"""Attacks a defense: as an outsider who may ask a running gateway, as an insider who has all of it, or as both.

    python -m training.redteam --gateway-url http://127.0.0.1:8080 --data phantom --queries 500
    python -m training.redteam --data DIR --victim DIR --artifact DIR
    python -m training.redteam --data DIR --victim DIR --artifact DIR --gateway-url URL
    python -m training.redteam --data DIR --victim DIR --artifact DIR --votes 20

The outsider has --queries answers for each image and attack: Square reads scores, HopSkipJump decisions only; a student
taught by --student-queries answers is attacked by PGD, and the result sent to the gateway (transfer). Corruptions are
tried as well. An image counts as lost if any answer within the budget was wrong.

The insider attacks by PGD with the exact gradient through sanitizer and victim, from two random starts, the second with
twice the steps; by PGD with the sanitizer as the identity in the gradient (BPDA); by PGD made for the bare victim
(transfer); by Auto-PGD; and by DDN for the smallest L2 change. With --votes the defense is the majority of noisy
copies, and gradients are means over --eot fresh ones. Without --artifact the bare victim is attacked.

At every size an image counts as lost if any attack succeeds (per-image worst case): rows `outsider` and `adaptive` (all
attacks) in --results. At the end the attacks themselves are checked, as a failing one says nothing about the defense.
Validation images, unless --split test.
"""

import sys
from collections.abc import Sequence
from functools import partial

from defense.attacks import least_right
from training.attack.config import RedTeamConfig
from training.attack.ensemble import AttackEnsemble
from training.attack.parties import parties
from training.command.verb import run
from training.data.datasets import load_data
from training.measure.results import NO_DEFENSE, measured_row
from training.measure.scoring import main_metric
from training.measure.selection import chosen_images


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.redteam") -> int:
    """Runs the verb."""
    return run(_attack, RedTeamConfig, argv, prog=prog)


def _attack(config: RedTeamConfig) -> int:
    splits = load_data(config)
    _, chosen = chosen_images(splits, config.split, config.limit, config.seed)
    metric = main_metric(chosen.labels)
    with parties(config, splits, chosen) as attackers:
        target = attackers.target
        name = config.name or (NO_DEFENSE if target.artifact is None else target.name or target.artifact)
        row = partial(
            measured_row,
            dataset=splits.name,
            task=splits.task,
            split=config.split,
            defense=name,
            queries=target.queries,
            seed=config.seed,
        )
        print(f"{name} on {splits.name}, {config.split}, {len(chosen)} images; {metric}, in %")
        if attackers.insider is not None:
            copies = f"majority of {config.votes} copies, EOT over {config.eot}" if config.votes else "one pass"
            print(f"insider: {copies}, PGD of {config.steps} steps")
        if attackers.outsider is not None:
            print(f"outsider: {config.queries} queries an image and run, {config.student_queries} for a student")
        ensemble = AttackEnsemble(
            attackers.insider, attackers.outsider, row, metric, least_right(chosen.labels), config.results
        )
        ensemble.run([size / 255 for size in config.epsilons_linf], config.epsilons_l2)
    print(f"Rows added to {config.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
