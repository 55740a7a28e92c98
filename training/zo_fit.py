"""Learns a sanitizer for a model nobody may open, from queries alone: ZO-DS and ZO-AE-DS (Zhang et al., ICLR 2022).

    python -m training.zo_fit --victim-url http://127.0.0.1:8000 --data phantom --sigma 0.25 --out artifacts/defense
    python -m training.zo_fit --victim-url URL --data DIR --sanitizer denoiser --max-queries 100000 --out OUT
    python -m training.zo_fit --victim-url URL --data DIR --estimator cge --out OUT --resume
    torchrun --nproc-per-node 2 -m training.zo_fit --victim-url URL ...

The victim is a URL: no weights, no gradients, no labels. --victim-url may be repeated: queries spread over replicas.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.artifact import Provenance, save_artifact
from defense.difference_table import PUBLISHED_MU
from defense.files import replace_file
from defense.sanitizer import Sanitizer, SanitizerConfig
from defense.victims import QueryLedger
from services.protocol.client import HTTPVictim
from training import pretrain
from training.command import cli
from training.command.errors import UserError
from training.command.provenance import settings_of, versions
from training.command.team import Team, joined, shared
from training.data.datasets import Splits, load_data
from training.fit.checkpoint import FILE_NAME, Checkpoint, Journal, resumed_ledger, under
from training.fit.options import AUTO, add_zo_arguments
from training.fit.parts import (
    build_estimator,
    build_student,
    difference_of,
    fit_settings,
    metered,
    method_name,
    needs_differences,
    recorded,
    refuse_meaningless,
)
from training.fit.presets import PRESETS, expanded
from training.fit.probe import answer_options, meet, meet_again
from training.fit.progress import log_end, train
from training.fit.trainer import Trainer
from training.measure.endpoints import Endpoint

logger = logging.getLogger(__name__)

Connect = Callable[..., AbstractContextManager[Endpoint]]
"""Takes the arguments of `HTTPVictim`."""

_PROBE_IMAGES = 32
MAY_CHANGE = frozenset(
    {
        "victim_url",
        "victim_mapping",
        "max_queries",
        "steps",
        "patience",
        "batch_images",
        "in_flight",
        "resume",
        "device",
        "out",
        "keep_surrogate",
        "task",  # the data's fingerprint tells it too, and runs from before there were two tasks did not note it
    }
)
"""Settings that a resumed run may have otherwise than the run it continues."""

_FORMER: dict[str, tuple[Any, ...]] = {
    "checked": (0,),
    "combine": ("unbiased",),
    "control_variate": (False,),
    "rotated": (0.0,),
    "slope_weight": (0.0,),
}
"""Settings that are gone, and the values at which a run of an older version goes on as it would have."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.zo_fit",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,  # or --pres would be taken for --preset after presets were expanded
    )
    cli.add_data_arguments(parser)
    cli.add_device_argument(parser)
    parser.add_argument("--preset", choices=PRESETS, help="a method by name; flags beside it override its own")
    add_zo_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None, *, connect: Connect = HTTPVictim) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the victim's client; tests pass one without sockets.

    Returns:
        The exit code: 0 when an artifact was written.
    """
    typed = sys.argv[1:] if argv is None else argv
    return cli.run(partial(_fit, connect=connect), build_parser(), expanded(typed))


def _fit(arguments: argparse.Namespace, connect: Connect) -> int:
    out: Path = arguments.out
    refuse_meaningless(arguments, build_parser())
    if arguments.estimator == "exact" and connect is HTTPVictim:
        raise UserError("--estimator exact needs an open model in process, as training.compare --victim has it")
    answers = answer_options(arguments)
    with ExitStack() as stack:
        team = stack.enter_context(joined())
        device = team.device(arguments.device)
        if arguments.batch < team.size:
            raise UserError(f"--batch {arguments.batch} is too small for {team.size} processes: raise it")
        splits = load_data(arguments)
        settings = {**settings_of(arguments), "data_fingerprint": splits.fingerprint}
        journal = Journal(out) if team.is_first else None
        if journal is not None:
            stack.callback(journal.close)
        checkpoint, spent = team.told(lambda: _resumed(arguments))
        if checkpoint is None:
            start = _pretrained(arguments, splits, team)
        else:
            _refuse_other_settings(checkpoint.state["settings"], settings)
            start = Sanitizer(SanitizerConfig.model_validate(checkpoint.state["architecture"]))
            start.load_state_dict(under("sanitizer", checkpoint.tensors))
        start.requires_grad_(True).to(device)
        build = partial(build_estimator, arguments, start)
        build(PUBLISHED_MU)  # refuses what does not fit before anything is spent

        ledger = QueryLedger(arguments.max_queries, spent, None if journal is None else journal.write)
        connected = partial(
            connect,
            arguments.victim_url,
            batch=arguments.batch_images,
            in_flight=arguments.in_flight,
            patience_s=arguments.patience,
            **answers,
        )
        client = stack.enter_context(shared(connected, team, on_resend=partial(ledger.charge, "resent")))
        victim = metered(client, ledger, arguments)
        if checkpoint is None:
            sample = _some(splits.train.images, _PROBE_IMAGES, arguments.seed)
            labels, report = meet(
                victim,
                client,
                start,
                sample,
                arguments.sigma,
                arguments.seed,
                difference=difference_of(arguments),
                mu=None if arguments.mu == AUTO else arguments.mu,
                needs_differences=needs_differences(arguments),
            )
            mu = report.mu
        else:
            known = checkpoint.state
            labels, mu = known["labels"], known["mu"]
            positions = tuple(known["positions"])
            meet_again(victim, client, labels, known["kind"], known["rounding"], positions, splits.train.images[0])
        trainer = Trainer(
            sanitizer=start,
            victim=victim,
            estimator=build(mu),
            images=splits.train.images,
            validation_images=_some(splits.validation.images, arguments.validation_images, arguments.seed),
            settings=fit_settings(arguments),
            folder=out,
            run_state={
                "settings": settings,
                "architecture": start.config.model_dump(mode="json"),
                "labels": labels,
                "kind": victim.kind,
                "rounding": victim.rounding,
                "positions": victim.positions,
                "mu": mu,
            },
            student=build_student(arguments, start, len(labels), victim.positions or (), device, writes=team.is_first),
            team=team,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
            logger.info("resumed after step %d, %d queries spent", trainer.step, ledger.total)
        reason = train(trainer, ledger)
        served, best = trainer.best_sanitizer()
        if not team.is_first:
            return 0
    log_end(trainer, reason, best)
    # The artifact last: where it is, the run is finished, and nothing of the surrogate stands beside it.
    replace_file(out / "history.json", (json.dumps([vars(entry) for entry in trainer.history]) + "\n").encode())
    if not arguments.keep_surrogate:
        trainer.forget_surrogate()
    manifest = save_artifact(
        out,
        served,
        name=out.name,
        labels=labels,
        sigma=arguments.sigma,
        queries=ledger.spent,
        provenance=Provenance(
            method=method_name(arguments),
            estimator=recorded(trainer.estimator),
            data=splits.name,
            data_fingerprint=splits.fingerprint,
            settings=settings,
            versions=versions(),
            validation={"step": best.step, "agreement": best.agreement, "loss": best.loss},
        ),
    )
    print(f"wrote {out} (artifact {manifest.id}); queries spent: {ledger.total} {json.dumps(ledger.spent)}")
    return 0


def _resumed(arguments: argparse.Namespace) -> tuple[Checkpoint | None, dict[str, int]]:
    """The checkpoint to go on from, if any, and what was spent so far."""
    checkpoint = _checkpoint_to_resume(arguments)
    return checkpoint, resumed_ledger(arguments.out, {} if checkpoint is None else checkpoint.state["ledger"])


def _checkpoint_to_resume(arguments: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run begins, or was killed before it wrote one."""
    has_checkpoint = (arguments.out / FILE_NAME).exists()
    sent = Journal.total(arguments.out)
    if not arguments.resume:
        if has_checkpoint or sent:
            raise UserError(
                f"{arguments.out} holds a run already: add --resume to continue it, or name another --out to keep it"
            )
        return None
    if sent and not has_checkpoint:
        logger.info("the run ended before its first checkpoint: it begins anew; its %d queries stay spent", sent)
        return None
    return Checkpoint.load(arguments.out)


def _refuse_other_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    former = {name for name, harmless in _FORMER.items() if old.get(name) in harmless}
    if old.get("estimator") != "surrogate":
        former.add("checked")  # which meant nothing there
    changed = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in MAY_CHANGE | former and old.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(f"the run to resume had other settings: {'; '.join(changed)}")


def _pretrained(arguments: argparse.Namespace, splits: Splits, team: Team) -> Sanitizer:
    """The sanitizer to start from; pre-trains it where --pretrained names none."""
    folder: Path = arguments.pretrained or arguments.out / "pretrained"
    if arguments.pretrained is None:
        team.told(lambda: pretrain.fit(arguments, splits, folder))
    name = "denoiser" if arguments.sanitizer == "denoiser" else "denoiser+autoencoder"
    return pretrain.load(folder, name, splits, arguments.sigma)


def _some(images: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the images, at random: they are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


if __name__ == "__main__":
    sys.exit(main())
