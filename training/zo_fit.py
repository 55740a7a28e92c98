"""Learns a sanitizer for a model nobody may open, from queries alone: ZO-DS and ZO-AE-DS (Zhang et al., ICLR 2022).

    python -m training.zo_fit --victim-url http://127.0.0.1:8000 --data phantom --sigma 0.25 --out artifacts/defense
    python -m training.zo_fit --victim-url URL --data DIR --sanitizer denoiser --max-queries 100000 --out OUT
    python -m training.zo_fit --victim-url URL --data DIR --estimator cge --out OUT --resume

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
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from defense.artifact import Provenance, save_artifact
from defense.errors import InvalidAnswer
from defense.estimators import (
    CoordinateGradientEstimator,
    Difference,
    Estimator,
    RandomGradientEstimator,
    Sampling,
)
from defense.files import replace_file
from defense.sanitizer import Sanitizer, SanitizerConfig
from defense.victims import MeteredVictim, QueryLedger
from services.device import resolve_device
from services.protocol.client import HTTPVictim
from services.protocol.errors import ServiceError
from training import cli, pretrain
from training.checkpoint import FILE_NAME, Checkpoint, Journal, resumed_ledger
from training.datasets import Splits, load_data
from training.measuring import Endpoint
from training.meeting import meet, meet_again
from training.provenance import settings_of, versions
from training.zo_trainer import FitSettings, Trainer, Validation

logger = logging.getLogger(__name__)

Connect = Callable[..., AbstractContextManager[Endpoint]]
"""Takes the arguments of `HTTPVictim`."""

_PROBE_IMAGES = 16
_MAY_CHANGE = frozenset(
    {"victim_url", "max_queries", "steps", "patience", "batch_images", "in_flight", "resume", "device", "out"}
)
"""Settings that a resumed run may have otherwise than the run it continues."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.zo_fit", description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    cli.add_device_argument(parser)
    victim = parser.add_argument_group("the victim")
    victim.add_argument("--victim-url", action="append", required=True, help="repeat it for replicas of one victim")
    victim.add_argument("--max-queries", type=cli.positive_int, default=40_000, help="hard budget (default 40000)")
    victim.add_argument(
        "--patience", type=cli.positive_float, default=120.0, help="seconds to wait for a victim that is away"
    )
    victim.add_argument("--batch-images", type=cli.positive_int, default=256, help="images a request (default 256)")
    victim.add_argument("--in-flight", type=cli.positive_int, default=4, help="requests at once (default 4)")

    method = parser.add_argument_group("the method")
    method.add_argument(
        "--sanitizer",
        choices=pretrain.SANITIZERS,
        default="denoiser+autoencoder",
        help="denoiser+autoencoder: ZO-AE-DS, the default; denoiser: ZO-DS, the gradient is estimated at the image",
    )
    method.add_argument("--estimator", choices=("rge", "cge"), default="rge", help="random or coordinate directions")
    method.add_argument("--directions", type=cli.positive_int, default=20, help="q of RGE (default 20)")
    method.add_argument("--sampling", choices=get_args(Sampling), default="sphere", help="RGE's directions")
    method.add_argument(
        "--difference", choices=get_args(Difference), help="default: forward for RGE, central for CGE, as published"
    )
    method.add_argument("--mu", type=cli.positive_float, default=0.005, help="step, in L2 norm (default 0.005)")
    method.add_argument("--batch", type=cli.positive_int, default=32, help="images an optimiser step (default 32)")
    method.add_argument("--learning-rate", type=cli.positive_float, default=3e-5, help="Adam's (default 3e-5)")
    method.add_argument(
        "--mse-weight", type=cli.non_negative_float, default=50.0, help="weight of the MSE term (default 50; 0: none)"
    )
    method.add_argument("--clip", type=cli.positive_float, default=1.0, help="bound on the gradient norm (default 1)")
    method.add_argument("--steps", type=cli.positive_int, help="at most so many steps; default: the budget decides")
    method.add_argument("--validation-images", type=cli.positive_int, default=512, help="at most so many (default 512)")
    method.add_argument("--validate-every", type=cli.positive_int, default=10, help="steps (default 10)")

    start = parser.add_argument_group("where it starts and ends")
    start.add_argument(
        "--pretrained",
        type=Path,
        help="what training.pretrain wrote, its models as they are; default: pre-train first, into OUT/pretrained",
    )
    pretrain.add_model_arguments(start)
    start.add_argument("--out", type=Path, default=Path("artifacts/defense"), help="folder of artifact and checkpoint")
    start.add_argument("--checkpoint-every", type=cli.positive_int, default=5, help="steps (default 5)")
    start.add_argument("--resume", action="store_true", help="continue the run in OUT, its ledger intact")
    return parser


def main(argv: Sequence[str] | None = None, *, connect: Connect = HTTPVictim) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the victim's client; tests pass one without sockets.

    Returns:
        The exit code: 0 when an artifact was written.
    """
    return cli.run(partial(_fit, connect=connect), build_parser(), argv)


def _fit(arguments: argparse.Namespace, connect: Connect) -> int:
    out: Path = arguments.out
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    settings = {**settings_of(arguments), "data_fingerprint": splits.fingerprint}
    with ExitStack() as stack:
        journal = Journal(out)
        stack.callback(journal.close)
        checkpoint = _checkpoint_to_resume(arguments)
        if checkpoint is None:
            start = _pretrained(arguments, splits)
        else:
            _refuse_other_settings(checkpoint.state["settings"], settings)
            start = Sanitizer(SanitizerConfig.model_validate(checkpoint.state["architecture"]))
        _refuse_too_many_directions(arguments, start)
        start.requires_grad_(True).to(device)

        spent = resumed_ledger(out, {} if checkpoint is None else checkpoint.state["ledger"])
        ledger = QueryLedger(arguments.max_queries, spent, journal.write)
        client = stack.enter_context(
            connect(
                arguments.victim_url,
                batch=arguments.batch_images,
                in_flight=arguments.in_flight,
                patience_s=arguments.patience,
                on_resend=partial(ledger.charge, "resent"),
            )
        )
        victim = MeteredVictim(client, ledger)
        if checkpoint is None:
            sample = _some(splits.train.images, _PROBE_IMAGES, arguments.seed)
            labels = meet(victim, client, start, sample, arguments.sigma, arguments.mu, arguments.seed)
        else:
            labels = checkpoint.state["labels"]
            meet_again(victim, client, labels, checkpoint.state["kind"], splits.train.images[0])
        trainer = Trainer(
            sanitizer=start,
            victim=victim,
            estimator=_estimator(arguments),
            images=splits.train.images,
            validation_images=_some(splits.validation.images, arguments.validation_images, arguments.seed),
            settings=_fit_settings(arguments),
            folder=out,
            run_state={
                "settings": settings,
                "architecture": start.config.model_dump(mode="json"),
                "labels": labels,
                "kind": victim.kind,
            },
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
            logger.info("resumed after step %d, %d queries spent", trainer.step, ledger.total)
        reason = _train(trainer, ledger)
        best = trainer.restore_best()
    _report(trainer, reason, best)
    manifest = save_artifact(
        out,
        trainer.sanitizer,
        name=out.name,
        labels=labels,
        sigma=arguments.sigma,
        queries=ledger.spent,
        provenance=Provenance(
            method="zo-ds" if arguments.sanitizer == "denoiser" else "zo-ae-ds",
            estimator={"name": arguments.estimator, **vars(trainer.estimator)},
            data=splits.name,
            data_fingerprint=splits.fingerprint,
            settings=settings,
            versions=versions(),
            validation={"step": best.step, "agreement": best.agreement, "loss": best.loss},
        ),
    )
    replace_file(out / "history.json", (json.dumps([vars(entry) for entry in trainer.history]) + "\n").encode())
    print(f"wrote {out} (artifact {manifest.id}); queries spent: {ledger.total} {json.dumps(ledger.spent)}")
    return 0


def _checkpoint_to_resume(arguments: argparse.Namespace) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run begins, or was killed before it wrote one."""
    has_checkpoint = (arguments.out / FILE_NAME).exists()
    sent = Journal.total(arguments.out)
    if not arguments.resume:
        if has_checkpoint or sent:
            raise cli.UserError(
                f"{arguments.out} holds a run already: add --resume to continue it, or name another --out to keep it"
            )
        return None
    if sent and not has_checkpoint:
        logger.info("the run ended before its first checkpoint: it begins anew; its %d queries stay spent", sent)
        return None
    return Checkpoint.load(arguments.out)


def _refuse_other_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in _MAY_CHANGE and old.get(name) != new.get(name)
    ]
    if changed:
        raise cli.UserError(f"the run to resume had other settings: {'; '.join(changed)}")


def _pretrained(arguments: argparse.Namespace, splits: Splits) -> Sanitizer:
    """The sanitizer to start from; pre-trains it where --pretrained names none."""
    folder: Path = arguments.pretrained or arguments.out / "pretrained"
    if arguments.pretrained is None:
        pretrain.fit(arguments, splits, folder)
    return pretrain.load(folder, arguments.sanitizer, splits, arguments.sigma)


def _refuse_too_many_directions(arguments: argparse.Namespace, sanitizer: Sanitizer) -> None:
    dimension = sanitizer.border_dimension
    if arguments.estimator == "rge" and arguments.sampling == "orthonormal" and arguments.directions > dimension:
        raise cli.UserError(
            f"--sampling orthonormal has at most {dimension} directions here, not {arguments.directions}: "
            "lower --directions"
        )


def _some(images: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the images, at random: they are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


def _estimator(arguments: argparse.Namespace) -> Estimator:
    if arguments.estimator == "cge":
        return CoordinateGradientEstimator(arguments.mu, arguments.difference or "central")
    return RandomGradientEstimator(
        arguments.directions, arguments.mu, arguments.sampling, arguments.difference or "forward"
    )


def _fit_settings(arguments: argparse.Namespace) -> FitSettings:
    return FitSettings(
        sigma=arguments.sigma,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        mse_weight=arguments.mse_weight,
        clip=arguments.clip,
        steps=arguments.steps,
        validate_every=arguments.validate_every,
        checkpoint_every=arguments.checkpoint_every,
        seed=arguments.seed,
    )


def _train(trainer: Trainer, ledger: QueryLedger) -> str:
    with tqdm(total=ledger.max_queries, initial=ledger.total, desc="zo_fit", unit="query", unit_scale=True) as bar:

        def on_step(loss: float) -> None:
            best = "-" if trainer.best is None else f"{trainer.best.agreement:.1%} at step {trainer.best.step}"
            bar.set_postfix_str(f"step {trainer.step}, loss {loss:.3f}, best agreement {best}", refresh=False)
            bar.update(ledger.total - bar.n)

        try:
            return trainer.fit(on_step)
        except (ServiceError, InvalidAnswer):
            logger.error("stopped after step %d; continue from the last checkpoint with --resume", trainer.step)
            raise


def _report(trainer: Trainer, reason: str, best: Validation) -> None:
    first = trainer.history[0]
    logger.info(
        "ended: %s. Validation at sigma, single noisy copy: agreement %.1f%% before, %.1f%% best (step %d)",
        reason,
        100 * first.agreement,
        100 * best.agreement,
        best.step,
    )


if __name__ == "__main__":
    sys.exit(main())
