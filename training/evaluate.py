r"""python -m training.evaluate --data DIR|phantom --victim artifacts/victim --victim-url http://127.0.0.1:8000.

    python -m training.evaluate --data phantom --victim artifacts/victim --victim-url http://127.0.0.1:8000 \
        --gateway zo-ae-ds=http://127.0.0.1:8080 --gateway mse=http://127.0.0.1:8081 \
        --attacks fgsm,pgd,pgd-l2,ddn --epsilons-linf 1,2,4,8 --epsilons-l2 0.5,1,2 --limit 200

What an oblivious attacker gains: the attacks are crafted on the bare victim's weights against the true labels, and the
same images are then sent as float32 tensors to the victim's URL (defense "none") and to every gateway's. The attacker
does not know of the gateway; an adaptive one would do better, and no number here bounds how much. Without --victim-url
the victim runs in this process, and so do artifacts (--artifact NAME=DIR) and the baselines that cost no query:

    python -m training.evaluate --data DIR --victim artifacts/victim --pretrained artifacts/pretrained \
        --baselines noise,jpeg,blur,median,ae,mse,mse-ae --artifact ours=artifacts/defense

With `torchrun --nproc-per-node N -m training.evaluate ...` N processes share the images.

Of a segmenter the scores are Dice and IoU, and the Dice of small lesions apart.

DDN is minimum-norm and yields two metrics beside the scores at the images that it made for the bare victim. `median_l2`
(no defense only): the median norm of its perturbations. `median_l2_scaled` (every defense): the median norm at which
the defense errs when DDN's perturbations are scaled up (`defense.attacks.scaled_norms`): an oblivious upper bound, not
an adaptive attack on the defense. Both medians are over the images that the bare victim gets right.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from defense.artifact import load_artifact
from defense.attacks import ATTACKS, attacks_on
from services.hospital.model import load_victim
from services.protocol.client import Endpoint
from training.attack.oblivious import Defense, Experiment
from training.command.cli import add_device_argument, positive_float, run
from training.command.errors import UserError
from training.command.team import Team, joined
from training.comparison.methods import METHODS
from training.comparison.runs import Run, build_front
from training.data.datasets import Splits, load_data
from training.fit.noise import with_noise
from training.measure.endpoints import (
    Connect,
    Defended,
    add_measuring_arguments,
    connect,
    defense_name,
    identify,
    number_list,
)
from training.measure.results import NO_DEFENSE, format_table, write_rows
from training.measure.scoring import SMALL, TITLES, main_metric
from training.measure.selection import chosen_images
from training.victim.files import data_fingerprint
from training.victim.in_process import in_process

CLEAR_MARGIN = 0.05
"""Lead of the first over the second probability from which on weights and URL must agree on the class."""

_PRETRAINED: Final = ("pretrained", "autoencoder")
_BASELINES: Final = [name for name, method in METHODS.items() if method.kind != "learned" and name != NO_DEFENSE]

logger = logging.getLogger(__name__)


def check_weights(model: nn.Module, device: torch.device, endpoint: Endpoint, url: str, images: Tensor) -> None:
    """Checks that the service at the victim's URL runs the weights on which the attacks are crafted.

    Raises:
        UserError: The two answer different classes for an image on which the weights are not undecided.
    """
    with torch.no_grad():
        logits = torch.cat([model(part.to(device)).cpu() for part in torch.split(images, 128)])
    top = logits.softmax(dim=1).topk(2, dim=1)
    clear = top.values[:, 0] - top.values[:, 1] > CLEAR_MARGIN
    wrong = clear & (endpoint(images).argmax(dim=1) != top.indices[:, 0])
    differ = int(wrong.view(len(images), -1).any(dim=1).sum())
    if differ:
        raise UserError(
            f"--victim and --victim-url are different models: they disagree about {differ} of {len(images)} clean "
            f"images; give the weights that the service at {url} was started with"
        )


def main(argv: Sequence[str] | None = None, *, connect: Connect = connect) -> int:
    """Runs the verb.

    Args:
        argv: The arguments, without the program's name.
        connect: Makes the client of a URL; tests pass one without sockets.
    """
    return run(lambda arguments: _evaluate(arguments, connect), _parser(), argv)


def _evaluate(arguments: argparse.Namespace, connect: Connect) -> int:
    names = [NO_DEFENSE, *arguments.baselines, *(name for name, _ in (*arguments.artifact, *arguments.gateway))]
    if len(set(names)) != len(names):
        raise UserError("every --gateway, --artifact and baseline needs a name of its own")
    if arguments.pretrained is None and any(METHODS[name].kind in _PRETRAINED for name in arguments.baselines):
        raise UserError("these baselines are pre-trained: make them with training.pretrain, and name --pretrained")
    with joined() as team:
        return _measure(arguments, connect, team)


def _measure(arguments: argparse.Namespace, connect: Connect, team: Team) -> int:
    device = team.device(arguments.device)
    model, config = load_victim(arguments.victim)
    model = model.to(device).eval()
    splits = load_data(arguments)
    _, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    possible = attacks_on(chosen.labels)
    attacks = arguments.attacks or possible
    if impossible := [attack for attack in attacks if attack not in possible]:
        raise UserError(f"--attacks {', '.join(impossible)}: for segmenters only; {splits.name} has one class an image")
    if tuple(config.labels) != tuple(splits.labels):
        raise UserError(f"the victim knows the classes {list(config.labels)}, the data has {list(splits.labels)}")
    if tuple(chosen.images.shape[1:]) != (config.channels, *config.size):
        raise UserError(f"the victim takes other images: use --size {config.size[0]} --channels {config.channels}")
    if data_fingerprint(arguments.victim) not in (None, splits.fingerprint):
        logger.warning(
            "%s was trained on other images or another split of them: it may have seen images of this test split; "
            "use its --data, --split-seed and --published-test",
            arguments.victim,
        )

    if len(chosen) < team.size:
        raise UserError(f"{len(chosen)} images are too few for {team.size} processes: raise --limit")

    with ExitStack() as clients:
        if arguments.victim_url is None:
            bare: Endpoint = clients.enter_context(in_process(arguments.victim, device, splits))
        else:
            bare = clients.enter_context(connect(arguments.victim_url))
            if identify(bare, arguments.victim_url, chosen.images[0], splits.labels).artifact is not None:
                raise UserError(f"a gateway answers at {arguments.victim_url}: --victim-url must name the bare victim")
            team.told(lambda: check_weights(model, device, bare, arguments.victim_url, chosen.images))
        defenses = [Defense(NO_DEFENSE, bare, 0), *_in_front(arguments, bare, splits, device, team)]
        for name, url in arguments.gateway:
            endpoint = clients.enter_context(connect(url))
            identity = identify(endpoint, url, chosen.images[0], splits.labels)
            if identity.artifact is None:
                raise UserError(f"no gateway answers at {url}, but a bare victim: --gateway {name} needs a gateway")
            defenses.append(Defense(name, endpoint, identity.queries))
        experiment = Experiment(
            dataset=splits.name,
            task=splits.task,
            split=arguments.split,
            seed=arguments.seed,
            model=model,
            device=device,
            images=chosen.images,
            labels=chosen.labels,
            defenses=tuple(defenses),
            team=team,
        )
        rows = experiment.clean()
        for attack in attacks:
            if ATTACKS[attack].minimum_norm:
                rows += experiment.minimal(attack)
                continue
            epsilons = arguments.epsilons_l2 if ATTACKS[attack].norm == "l2" else arguments.epsilons_linf
            for epsilon in epsilons:
                rows += experiment.bounded(attack, epsilon)
    if not team.is_first:
        return 0
    write_rows(arguments.results, rows)
    where = "in process" if arguments.victim_url is None else "over HTTP"
    print(
        f"{splits.name}, {arguments.split}, {len(chosen)} images; victim {where}; oblivious attacks, crafted on the "
        "bare victim"
    )
    for metric in dict.fromkeys((main_metric(chosen.labels), SMALL)):
        shown = [row for row in rows if row.metric in (metric, "median_l2", "median_l2_scaled")]
        if any(row.metric == metric for row in shown):
            print(f"{TITLES[metric]}, in %")
            print(format_table(shown))
    print(f"Rows added to {arguments.results}")
    return 0


def _in_front(
    arguments: argparse.Namespace, victim: Endpoint, splits: Splits, device: torch.device, team: Team
) -> Iterator[Defense]:
    """The defenses that run in this process, in front of the victim wherever that is."""
    source = torch.Generator().manual_seed(arguments.seed + team.rank)

    def noisy(images: Tensor) -> Tensor:
        """One noisy copy; the smoothed victim is `training.certify`'s and `training.compare`'s."""
        return with_noise(images, arguments.sigma, source)

    shape = splits.test.images.shape[1:]
    for name in arguments.baselines:
        front, _ = build_front(Run(name, 0, 0), arguments.results.parent, arguments.pretrained, device)
        yield Defense(name, Defended(noisy if name == "noise" else front, victim, device), 0)
    for name, folder in arguments.artifact:
        artifact = load_artifact(folder)
        if artifact.manifest.input.dimensions != tuple(shape):
            raise UserError(f"--artifact {name} takes other images: use its --size and --channels")
        sanitizer = artifact.sanitizer.to(device).eval().to(memory_format=torch.channels_last)
        yield Defense(name, Defended(sanitizer, victim, device), artifact.manifest.queries_spent)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Measures oblivious attacks.")
    add_measuring_arguments(parser)
    add_device_argument(parser)
    parser.add_argument("--victim", type=Path, default=Path("artifacts/victim"), help="the victim's weights, to attack")
    parser.add_argument("--victim-url", help="where the bare victim answers (default: in this process)")
    parser.add_argument(
        "--gateway", type=_gateway, action="append", default=[], metavar="NAME=URL", help="a gateway; may be repeated"
    )
    parser.add_argument(
        "--artifact", type=_artifact, action="append", default=[], metavar="NAME=DIR", help="a sanitizer, in process"
    )
    parser.add_argument(
        "--baselines", type=_baselines, default=[], help=f"comma-separated, in process, of {', '.join(_BASELINES)}"
    )
    parser.add_argument("--pretrained", type=Path, help="what training.pretrain wrote, for baselines from there")
    parser.add_argument("--sigma", type=positive_float, default=0.25, help="of the baseline noise (default 0.25)")
    parser.add_argument(
        "--attacks", type=_attacks, help=f"comma-separated, of {', '.join(ATTACKS)} (all that the task has)"
    )
    parser.add_argument(
        "--epsilons-linf", type=_levels, default=_levels("1,2,4,8"), help="comma-separated, in 1/255 (1,2,4,8)"
    )
    parser.add_argument(
        "--epsilons-l2", type=number_list, default=[0.5, 1.0, 2.0], help="comma-separated, in units of [0,1] (0.5,1,2)"
    )
    return parser


def _gateway(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not separator or not url or name == NO_DEFENSE:
        raise argparse.ArgumentTypeError(f"expected NAME=URL with a name other than {NO_DEFENSE!r}, got {text!r}")
    return defense_name(name), url


def _artifact(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator or not folder or name == NO_DEFENSE:
        raise argparse.ArgumentTypeError(f"expected NAME=DIR with a name other than {NO_DEFENSE!r}, got {text!r}")
    return defense_name(name), Path(folder)


def _baselines(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in _BASELINES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(_BASELINES)}")
    return names


def _attacks(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in ATTACKS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    return names


def _levels(text: str) -> list[float]:
    return [size / 255 for size in number_list(text)]


if __name__ == "__main__":
    sys.exit(main())
