"""A run of zeroth-order training, from a configuration, a victim and images to an artifact."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import JsonValue
from torch import Tensor

from defense.artifact import Artifact, Manifest, Provenance, save_artifact
from defense.difference_table import PUBLISHED_MU
from defense.files import replace_file
from defense.sanitizer import Sanitizer, SanitizerConfig
from defense.victims import QueryLedger
from services.protocol.client import Endpoint, HTTPVictim
from training.command.errors import UserError
from training.command.provenance import versions
from training.command.team import ALONE, Team, shared
from training.data.datasets import Splits
from training.fit.builders import build_estimator, build_student, metered, recorded
from training.fit.checkpoint import FILE_NAME, Checkpoint, Journal, resumed_ledger, under
from training.fit.config import FitConfig
from training.fit.pretraining import load_pretrained, pretrain
from training.fit.probe import probe_victim, recall_victim
from training.fit.progress import log_end, train
from training.fit.trainer import Trainer
from training.victim.function import FunctionVictim

logger = logging.getLogger(__name__)

MAY_CHANGE: Final = frozenset(
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
        "preset",  # what it stands for is compared
        "task",  # the data's fingerprint tells it too, and runs from before there were two tasks did not note it
    }
)
"""Settings that a resumed run may have otherwise than the run it continues."""

_FORMER: Final[dict[str, JsonValue]] = {
    "checked": 0,
    "combine": "unbiased",
    "control_variate": False,
    "rotated": 0.0,
    "slope_weight": 0.0,
}
"""Settings that are gone, with the values at which a run of an older version goes on as it would have."""

_PROBE_IMAGES: Final = 32


def fit(
    config: FitConfig,
    victim: Endpoint | Callable[[Tensor], Tensor],
    splits: Splits,
    *,
    out: Path | str,
    pretrained: Path | None = None,
    resume: bool = False,
    keep_surrogate: bool = False,
    device: str = "auto",
    team: Team = ALONE,
) -> Artifact:
    """Learns a sanitizer from a victim's answers, and writes it to `out` beside the run's checkpoint and journal.

    Args:
        config: How to learn; all of its fields are recorded in the artifact.
        victim: `HTTPVictim`, or a function from images (N,C,H,W) to scores (N,K) or (N,K,H,W), whose classes
            `FunctionVictim` can name. Every image sent is booked, including those sent again.
        splits: Training and validation images; labels are not used.
        out: Folder of the run.
        pretrained: What `pretrain` wrote; None: pre-train first, into `out`/pretrained.
        resume: Continue the run in `out` with its ledger.
        keep_surrogate: Keep the surrogate, a partial copy of the victim, in `out` after training.
        device: "auto", "cpu", "cuda" or "cuda:N".
        team: The processes that share the work.

    Returns:
        The best validated sanitizer.

    Raises:
        UserError: The configuration does not fit the images, the victim, or the run in `out`.
        DefenseError: The victim's noise allows no step, the budget no step, or a gradient was not finite.
        ServiceError: The victim is unavailable or its answers are invalid; the last checkpoint is kept.
    """
    out = Path(out)
    if config.estimator == "exact" and isinstance(victim, HTTPVictim):
        raise UserError("--estimator exact needs an open model in process, as training.compare --victim has it")
    if config.batch < team.size:
        raise UserError(f"--batch {config.batch} is too small for {team.size} processes: raise it")
    endpoint = victim if isinstance(victim, Endpoint) else FunctionVictim(victim)
    settings = {**config.model_dump(mode="json"), "data_fingerprint": splits.fingerprint}
    with ExitStack() as stack:
        journal = Journal(out) if team.is_first else None
        if journal is not None:
            stack.callback(journal.close)
        checkpoint, spent = team.told(lambda: _resumed(out, resume))
        if checkpoint is None:
            start = _pretrained(config, splits, pretrained, out, device, team)
        else:
            _refuse_other_settings(checkpoint.state["settings"], settings)
            start = Sanitizer(SanitizerConfig.model_validate(checkpoint.state["architecture"]))
            start.load_state_dict(under("sanitizer", checkpoint.tensors))
        where = team.device(device)
        start.requires_grad_(True).to(where)
        build = partial(build_estimator, config, start)
        build(PUBLISHED_MU)  # refuses what does not fit before anything is spent

        ledger = QueryLedger(config.max_queries, spent, None if journal is None else journal.write)
        client = stack.enter_context(shared(endpoint, team, on_resend=partial(ledger.charge, "resent")))
        asked = metered(client, ledger, config)
        if checkpoint is None:
            sample = _some(splits.train.images, _PROBE_IMAGES, config.seed)
            labels, report = probe_victim(asked, client, start, sample, config)
            mu = report.mu
        else:
            labels, mu = checkpoint.state["labels"], checkpoint.state["mu"]
            recall_victim(asked, client, checkpoint.state, splits.train.images[0])
        trainer = Trainer(
            sanitizer=start,
            victim=asked,
            estimator=build(mu),
            images=splits.train.images,
            validation_images=_some(splits.validation.images, config.validation_images, config.seed),
            config=config,
            folder=out,
            run_state={
                "settings": settings,
                "architecture": start.config.model_dump(mode="json"),
                "labels": labels,
                "kind": asked.kind,
                "rounding": asked.rounding,
                "positions": asked.positions,
                "mu": mu,
            },
            student=build_student(config, start, len(labels), asked.positions or (), where, out, writes=team.is_first),
            team=team,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
            logger.info("resumed after step %d, %d queries spent", trainer.step, ledger.total)
        reason = train(trainer, ledger)
        log_end(trainer, reason)
        manifest = team.told(lambda: _save(trainer, config, splits, settings, labels, keep_surrogate=keep_surrogate))
        return Artifact(trainer.best_sanitizer()[0], manifest)


def _save(
    trainer: Trainer,
    config: FitConfig,
    splits: Splits,
    settings: dict[str, Any],
    labels: list[str],
    *,
    keep_surrogate: bool,
) -> Manifest:
    """Writes the artifact last: if it exists, the run is finished, and its surrogate deleted unless kept."""
    out = trainer.folder
    served, best = trainer.best_sanitizer()
    replace_file(out / "history.json", (json.dumps([vars(entry) for entry in trainer.history]) + "\n").encode())
    if not keep_surrogate:
        trainer.forget_surrogate()
    return save_artifact(
        out,
        served,
        name=out.name,
        labels=labels,
        sigma=config.sigma,
        queries=trainer.victim.ledger.spent,
        provenance=Provenance(
            method=config.method,
            estimator=recorded(trainer.estimator),
            data=splits.name,
            data_fingerprint=splits.fingerprint,
            settings=settings,
            versions=versions(),
            validation={"step": best.step, "agreement": best.agreement, "loss": best.loss},
        ),
    )


def _resumed(out: Path, resume: bool) -> tuple[Checkpoint | None, dict[str, int]]:
    """The checkpoint to continue from, if any, and the ledger so far."""
    checkpoint = _checkpoint_to_resume(out, resume)
    return checkpoint, resumed_ledger(out, {} if checkpoint is None else checkpoint.state["ledger"])


def _checkpoint_to_resume(out: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from; None if the run is new or was killed before its first checkpoint."""
    has_checkpoint = (out / FILE_NAME).exists()
    sent = Journal.total(out)
    if not resume:
        if has_checkpoint or sent:
            raise UserError(f"{out} holds a run already: add --resume to continue it, or name another --out to keep it")
        return None
    if sent and not has_checkpoint:
        logger.info("the run ended before its first checkpoint: it begins anew; its %d queries stay spent", sent)
        return None
    return Checkpoint.load(out)


def _refuse_other_settings(old: dict[str, Any], new: dict[str, Any]) -> None:
    former = {name for name, harmless in _FORMER.items() if old.get(name) == harmless}
    if old.get("estimator") != "surrogate":
        former.add("checked")  # which meant nothing there
    changed = [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in MAY_CHANGE | former and old.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(f"the run to resume had other settings: {'; '.join(changed)}")


def _pretrained(
    config: FitConfig, splits: Splits, folder: Path | None, out: Path, device: str, team: Team
) -> Sanitizer:
    """The sanitizer to start from, pre-trained now if no folder has it."""
    if folder is None:
        folder = out / "pretrained"
        team.told(partial(pretrain, config, splits, folder, team.device(device)))
    return load_pretrained(
        folder, "denoiser" if config.sanitizer == "denoiser" else "denoiser+autoencoder", splits, config.sigma
    )


def _some(images: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the images, at random, as they are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
