r"""Attacks a defense: as an outsider who may ask a running gateway, as an insider who has all of it, or as both.

    python -m training.redteam --gateway-url http://127.0.0.1:8080 --data phantom --queries 500
    python -m training.redteam --data DIR --victim DIR --artifact DIR
    python -m training.redteam --data DIR --victim DIR --artifact DIR --gateway-url URL
    python -m training.redteam --data DIR --victim DIR --artifact DIR --votes 20

The outsider has --queries answers for each image and run of an attack: Square reads the scores, HopSkipJump the
decisions alone; a student that --student-queries answers have taught is attacked by PGD, and the result is tried on the
gateway (transfer). Corruptions, which nobody means, are tried as well. An image counts as lost if any answer within the
budget was wrong.

The insider attacks with PGD by the exact gradient through sanitizer and victim, from two random starts, the second with
twice the steps; with PGD whose gradient passes the sanitizer as if it did nothing (BPDA); and with PGD made for the
bare victim (transfer); and with Auto-PGD, which chooses its steps. DDN looks for the smallest L2 change. With --votes
the defense is the majority of so many noisy copies, and gradients are means over --eot fresh ones. Without --artifact
the bare victim is attacked.

At every size each image counts as lost if any attack succeeds (the per-image worst case): `outsider` of the outsider's
attacks, `adaptive` of all, in the rows that go to --results. At the end the attacks themselves are checked: one that
fails says nothing about the defense. Validation images, unless --split test.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import torch

from defense.artifact import load_artifact
from defense.attacks import least_right
from services.device import resolve_device
from services.protocol.client import HTTPVictim
from services.protocol.mapping import load_mapping
from training.attack.campaign import Campaign
from training.attack.insider import Insider
from training.attack.outsider import Outsider
from training.command.cli import add_device_argument, non_negative_int, positive_int, run
from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits, load_data
from training.measure.endpoints import Identity, add_measuring_arguments, defense_name, identify, number_list
from training.measure.results import NO_DEFENSE, measured_row
from training.measure.scoring import main_metric
from training.measure.selection import chosen_images
from training.victim.in_process import in_process

_PATIENCE_S: Final = 10.0
"""How long the outsider waits where the gateway is away or refuses, in seconds: rates pass, suspicion does not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb."""
    return run(_attack, build_parser(), argv)


def _attack(arguments: argparse.Namespace) -> int:
    if arguments.victim is None and arguments.gateway_url is None:
        raise UserError("nothing to attack: name --gateway-url (a running gateway), --victim (its weights), or both")
    if arguments.victim is None and arguments.artifact is not None:
        raise UserError("--artifact is attacked together with the weights behind it: name --victim too")
    if arguments.votes and arguments.artifact is None:
        raise UserError("--votes is about noisy copies in front of a sanitizer: name --victim and --artifact")
    if arguments.votes and arguments.gateway_url is not None:
        raise UserError(
            "--votes attacks the vote in this process, a gateway answers in its own mode: attack them apart"
        )
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    _, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    with ExitStack() as stack:
        insider, told = _insider(arguments, splits, chosen, device, stack)
        outsider, asked = _outsider(arguments, splits, chosen, device, stack)
        if told is not None and asked is not None and told.artifact != asked.artifact:
            raise UserError(
                f"the gateway serves {asked.artifact or 'no artifact'}, --artifact is {told.artifact or 'not given'}: "
                "name the artifact that it serves"
            )
        who = told or asked
        assert who is not None
        name = arguments.name or (NO_DEFENSE if who.artifact is None else who.name or who.artifact)
        row = partial(
            measured_row,
            dataset=splits.name,
            task=splits.task,
            split=arguments.split,
            defense=name,
            queries=who.queries,
            seed=arguments.seed,
        )
        metric = main_metric(chosen.labels)
        campaign = Campaign(insider, outsider, row, metric, least_right(chosen.labels), arguments.results)
        print(f"{name} on {splits.name}, {arguments.split}, {len(chosen)} images; {metric}, in %")
        if insider is not None:
            copies = (
                f"majority of {arguments.votes} copies, EOT over {arguments.eot}" if arguments.votes else "one pass"
            )
            print(f"insider: {copies}, PGD of {arguments.steps} steps")
        if outsider is not None:
            print(f"outsider: {arguments.queries} queries an image and run, {arguments.student_queries} for a student")
        campaign.run([size / 255 for size in arguments.epsilons_linf], arguments.epsilons_l2)
    print(f"Rows added to {arguments.results}")
    return 0


def _insider(
    arguments: argparse.Namespace, splits: Splits, chosen: ImageSet, device: torch.device, stack: ExitStack
) -> tuple[Insider | None, Identity | None]:
    if arguments.victim is None:
        return None, None
    sanitizer, sigma, who = None, 0.0, Identity(artifact=None, queries=0)
    if arguments.artifact is not None:
        artifact = load_artifact(arguments.artifact)
        manifest = artifact.manifest
        if tuple(chosen.images.shape[1:]) != manifest.input.dimensions:
            raise UserError(f"{arguments.artifact} takes other images: use its --size and --channels")
        sanitizer, sigma = artifact.sanitizer.to(device).eval().requires_grad_(False), manifest.sigma
        who = Identity(manifest.id, manifest.queries_spent, manifest.name)
    victim = stack.enter_context(in_process(arguments.victim, device, splits))
    insider = Insider(
        victim.model,
        sanitizer,
        chosen.images.to(device),
        chosen.labels.to(device),
        sigma=sigma,
        votes=arguments.votes,
        eot=arguments.eot,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    return insider, who


def _outsider(
    arguments: argparse.Namespace, splits: Splits, chosen: ImageSet, device: torch.device, stack: ExitStack
) -> tuple[Outsider | None, Identity | None]:
    url = arguments.gateway_url
    if url is None:
        return None, None
    mapping = load_mapping(arguments.gateway_mapping)
    endpoint = stack.enter_context(HTTPVictim([url], patience_s=_PATIENCE_S, mapping=mapping))
    who = identify(endpoint, url, chosen.images[0], splits.labels)
    outsider = Outsider(
        endpoint,
        chosen.images,
        chosen.labels,
        splits.train.images,
        queries=arguments.queries,
        student_queries=arguments.student_queries,
        student_steps=arguments.student_steps or (1200 if chosen.labels.ndim == 1 else 400),
        steps=arguments.steps,
        seed=arguments.seed,
        device=device,
    )
    return outsider, who


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.redteam", description=__doc__.partition("\n")[0])
    add_measuring_arguments(parser)
    add_device_argument(parser)
    parser.set_defaults(split="validation")
    add = parser.add_argument
    add("--name", type=defense_name, help="of the defense in the results (default the artifact's)")
    add("--epsilons-linf", type=number_list, default=[0.5, 1.0, 2.0, 4.0, 8.0], help="in 1/255 (0.5,1,2,4,8)")
    add("--epsilons-l2", type=number_list, default=[0.25, 0.5, 1.0, 2.0], help="(0.25,0.5,1,2)")
    add("--steps", type=positive_int, default=40, help="of PGD (default 40)")
    group = parser.add_argument_group("outsider")
    add = group.add_argument
    add("--gateway-url", help="where the gateway answers")
    add("--gateway-mapping", type=Path, help="a mapping file, for [headers] such as X-API-Key (docs/victims.md)")
    add("--queries", type=positive_int, default=500, help="an image and run of an attack (default 500)")
    add("--student-queries", type=non_negative_int, default=2000, help="to teach a student (default 2000; 0: none)")
    add("--student-steps", type=positive_int, help="of its optimiser (default 1200; of a segmenter's, 400)")
    group = parser.add_argument_group("insider")
    add = group.add_argument
    add("--victim", type=Path, help="the model's weights, as training.victim_fit wrote")
    add("--artifact", type=Path, help="the sanitizer (default none: the bare victim)")
    add("--votes", type=non_negative_int, default=0, help="noisy copies that vote (default 0: one pass, no noise)")
    add("--eot", type=positive_int, default=20, help="noisy copies a gradient (default 20)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
