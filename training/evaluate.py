r"""python -m training.evaluate --data DIR|phantom --victim artifacts/victim --victim-url http://127.0.0.1:8000.

    python -m training.evaluate --data phantom --victim artifacts/victim --victim-url http://127.0.0.1:8000 \
        --gateway zo-ae-ds=http://127.0.0.1:8080 --gateway mse=http://127.0.0.1:8081 \
        --attacks fgsm,pgd,pgd-l2,ddn --epsilons-linf 1,2,4,8 --epsilons-l2 0.5,1,2 --limit 200

Measures an oblivious attacker: attacks are crafted on the bare victim's weights against the true labels, and the images
sent as float32 tensors to the victim's URL (defense "none") and to every gateway. An adaptive attacker would do better,
and no number here bounds how much. Without --victim-url the victim runs in this process, as do artifacts
(--artifact NAME=DIR) and the baselines that cost no query:

    python -m training.evaluate --data DIR --victim artifacts/victim --pretrained artifacts/pretrained \
        --baselines noise,jpeg,blur,median,ae,mse,mse-ae --artifact ours=artifacts/defense

With `torchrun --nproc-per-node N -m training.evaluate ...` N processes share the images.

Scores of a segmenter are Dice and IoU, and separately the Dice of small lesions.

DDN is minimum-norm and adds two medians over the images that the bare victim gets right: `median_l2` (no defense only),
the norm of its perturbations, and `median_l2_scaled` (every defense), the norm at which the defense errs when they are
scaled up (`defense.attacks.scaled_norms`): an oblivious upper bound, not an adaptive attack.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from defense.attacks import attacks_on
from services.protocol.client import Endpoint
from training.attack.oblivious import Experiment, check_weights
from training.command.errors import UserError
from training.command.team import joined
from training.command.verb import run
from training.comparison.evaluation import EvaluateConfig, defenses
from training.data.datasets import load_data
from training.measure.endpoints import Connect, connect, identify
from training.measure.results import Row, format_table, measured_row, write_rows
from training.measure.scoring import SMALL, TITLES, main_metric
from training.measure.selection import chosen_images
from training.victim.in_process import in_process


def main(
    argv: Sequence[str] | None = None, *, connect: Connect = connect, prog: str = "python -m training.evaluate"
) -> int:
    """Runs the verb.

    Args:
        argv: The arguments, without the program's name.
        connect: Makes the client of a URL; tests pass one without sockets.
        prog: The program, as messages name it.
    """
    return run(partial(_evaluate, connect=connect), EvaluateConfig, argv, prog=prog)


def _evaluate(config: EvaluateConfig, connect: Connect) -> int:
    with joined() as team, ExitStack() as stack:
        device = team.device(config.device)
        splits = load_data(config)
        _, chosen = chosen_images(splits, config.split, config.limit, config.seed)
        weights = stack.enter_context(in_process(config.victim, device, splits))
        identify(weights, str(config.victim), chosen.images[0], splits.labels)
        attacks = config.attacks or attacks_on(chosen.labels)
        if impossible := [attack for attack in attacks if attack not in attacks_on(chosen.labels)]:
            told = ", ".join(impossible)
            raise UserError(f"--attacks {told}: for segmenters only; {splits.name} has one class an image")
        if len(chosen) < team.size:
            raise UserError(f"{len(chosen)} images are too few for {team.size} processes: raise --limit")
        bare: Endpoint = weights
        if (url := config.victim_url) is not None:
            bare = stack.enter_context(connect(url))
            if identify(bare, url, chosen.images[0], splits.labels).artifact is not None:
                raise UserError(f"a gateway answers at {url}: --victim-url must name the bare victim")
            team.told(lambda: check_weights(weights, bare, url, chosen.images))
        experiment = Experiment(
            row=partial(measured_row, dataset=splits.name, task=splits.task, split=config.split, seed=config.seed),
            seed=config.seed,
            model=weights.model,
            device=device,
            images=chosen.images,
            labels=chosen.labels,
            defenses=stack.enter_context(defenses(config, bare, splits, chosen, team, connect)),
            team=team,
        )
        rows = experiment.run(attacks, [size / 255 for size in config.epsilons_linf], config.epsilons_l2)
        if not team.is_first:
            return 0
    write_rows(config.results, rows)
    where = "in process" if config.victim_url is None else "over HTTP"
    print(
        f"{splits.name}, {config.split}, {len(chosen)} images; victim {where}; oblivious attacks, crafted on the "
        "bare victim"
    )
    _print_tables(rows, main_metric(chosen.labels))
    print(f"Rows added to {config.results}")
    return 0


def _print_tables(rows: Sequence[Row], main: str) -> None:
    for metric in dict.fromkeys((main, SMALL)):
        shown = [row for row in rows if row.metric in (metric, "median_l2", "median_l2_scaled")]
        if any(row.metric == metric for row in shown):
            print(f"{TITLES[metric]}, in %")
            print(format_table(shown))


if __name__ == "__main__":
    sys.exit(main())
