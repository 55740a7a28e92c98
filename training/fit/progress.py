"""What a run of `zo_fit` shows of itself while it learns: a bar, a log, and curves for TensorBoard."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from tqdm import tqdm

from defense.errors import InvalidAnswer
from defense.victims import QueryLedger
from services.protocol.errors import ServiceError
from training.fit.trainer import Trainer

logger = logging.getLogger(__name__)

CURVES: Final = "tensorboard"
"""Below the run's folder: event files; `tensorboard --logdir` shows one run, or all below a folder."""


def train(trainer: Trainer, ledger: QueryLedger) -> str:
    """Trains to the end with a progress bar and curves; returns why it ended, and raises as `Trainer.fit`."""
    is_first = trainer.team.is_first
    with (
        tqdm(
            total=ledger.max_queries,
            initial=ledger.total,
            desc="zo_fit",
            unit="query",
            unit_scale=True,
            disable=not is_first,
        ) as bar,
        _curves(trainer, ledger) as draw,
    ):

        def on_step(loss: float) -> None:
            best = "-" if trainer.best is None else f"{trainer.best.agreement:.1%} at step {trainer.best.step}"
            bar.set_postfix_str(f"step {trainer.step}, loss {loss:.3f}, best agreement {best}", refresh=False)
            bar.update(ledger.total - bar.n)
            draw(loss)

        try:
            return trainer.fit(on_step)
        except (ServiceError, InvalidAnswer):
            logger.error("stopped after step %d; continue from the last checkpoint with --resume", trainer.step)
            raise


def log_end(trainer: Trainer, reason: str) -> None:
    """Logs how it ended."""
    first, best = trainer.history[0], trainer.best
    assert best is not None  # trained
    logger.info(
        "ended: %s. Validation at sigma, single noisy copy: agreement %.1f%% before, %.1f%% best (step %d)",
        reason,
        100 * first.agreement,
        100 * best.agreement,
        best.step,
    )


@contextmanager
def _curves(trainer: Trainer, ledger: QueryLedger) -> Iterator[Callable[[float], None]]:
    """Yields a function that draws a step, given its loss: losses, queries and validations.

    A resumed run drops what was drawn after its checkpoint.
    """
    if not trainer.team.is_first:
        yield lambda loss: None
        return
    from torch.utils.tensorboard import SummaryWriter  # takes a second, which other verbs need not wait

    resumed = {"purge_step": trainer.step + 1} if trainer.step else {}
    drawn = len(trainer.history)
    with SummaryWriter(str(trainer.folder / CURVES), **resumed) as writer:

        def validations() -> None:
            nonlocal drawn
            for entry in trainer.history[drawn:]:
                kind = "" if entry.reconstruction else ", without reconstruction"
                writer.add_scalar(f"validation/loss{kind}", entry.loss, entry.step)
                writer.add_scalar(f"validation/agreement{kind}", entry.agreement, entry.step)
                writer.add_scalar("queries/at validation", entry.queries, entry.step)
            drawn = len(trainer.history)

        def draw(loss: float) -> None:
            writer.add_scalar("training/loss", loss, trainer.step)
            writer.add_scalar("queries/all", ledger.total, trainer.step)
            for purpose, spent in ledger.spent.items():
                writer.add_scalar(f"queries/{purpose}", spent, trainer.step)
            validations()

        try:
            yield draw
        finally:
            validations()  # the last one comes after the last step
