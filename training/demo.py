"""The main job, end to end, with real processes that talk HTTP: a black box, its defense, attacks, and one table.

    python -m training.demo --data phantom --out artifacts
    python -m training.demo --data DIR --out artifacts --max-queries 200000

Run again after an interruption, it goes on where it stopped: whatever is finished below OUT/<data set> is used again;
a larger --max-queries continues the learned defenses.
"""

import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import Field, PositiveInt

from services.settings import flags_of
from training.command.subprocesses import ProcessFailed, run_verb, service
from training.command.verb import run
from training.data.config import PHANTOM, DataConfig
from training.data.datasets import dataset_name, settled
from training.demonstration.stages import (
    GRID_NAME,
    METHODS,
    SAMPLES_NAME,
    claim,
    learn,
    pretrain,
    print_next_steps,
    train_victim,
)
from training.fit.checkpoint import Journal
from training.fit.config import RunConfig

logger = logging.getLogger(__name__)


class DemoConfig(DataConfig):
    """The main job, end to end, with real processes over HTTP: a black box, its defense, attacks, and one table."""

    out: Path = Field(Path("artifacts"), description="everything goes below it")
    epochs: PositiveInt | None = Field(
        None, description="of the victim (default: 16 for phantom masks, else victim_fit's)"
    )
    pretrain_steps: PositiveInt | None = Field(None, description="default: 600 for phantoms, else 1200")
    max_queries: PositiveInt | None = Field(
        None, description="for each defense; default: 15000 for phantoms, else 100000"
    )
    limit: PositiveInt | None = Field(
        None, description="test images attacked; default: 150 for phantoms (masks: 50), else 300"
    )


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.demo") -> int:
    """Runs the command; returns its exit code."""
    # SIGTERM unwinds like Ctrl-C, so that the services it started are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(_demo, DemoConfig, argv, prog=prog)


def _demo(typed: DemoConfig) -> int:
    begun = time.monotonic()
    config = settled(typed)
    assert config.task is not None  # settled
    is_phantom, masks = config.data == PHANTOM, config.task == "segmentation"
    images = DataConfig(**typed.model_dump(include=set(DataConfig.model_fields)))
    data = ["--data", images.data, *flags_of(images, {"data": images.data})]
    # Two sets of phantoms have one name.
    out = config.out / (dataset_name(config.data) + ("-masks" if is_phantom and masks else ""))
    log = out / "commands.log"
    results = config.out / "results.json"
    max_queries = config.max_queries or (15_000 if is_phantom else 100_000)
    pretrain_steps = config.pretrain_steps or (600 if is_phantom else 1200)
    # The U-Net's own default takes longer than all the rest.
    epochs = config.epochs or (16 if is_phantom and masks else None)
    limit = config.limit or (300 if not is_phantom else 50 if masks else 150)
    claim(out, {"data": data, "epochs": epochs, "pretrain_steps": pretrain_steps})
    with ExitStack() as stack:
        victim = train_victim(epochs, data, out, log)
        hospital = stack.enter_context(service("services.hospital", ["--model", str(victim)], out / "hospital.log"))
        pretrained = pretrain(data, pretrain_steps, out, log)
        defenses = {"mse": pretrained / "denoiser"}
        for name, preset in METHODS[config.task].items():
            defenses[name] = out / name
            learning = RunConfig(
                **images.model_dump(),
                preset=preset,
                victim_url=(hospital,),
                pretrained=pretrained,
                max_queries=max_queries,
                out=out / name,
                resume=Journal.total(out / name) > 0,
            )
            learn(learning, log)
        gateways: list[str] = []
        for name, artifact in defenses.items():
            flags = ["--artifact", str(artifact), "--victim-url", hospital]
            url = stack.enter_context(service("services.gateway", flags, out / f"gateway-{name}.log"))
            gateways += ["--gateway", f"{name}={url}"]
        run_verb(
            "training.evaluate",
            [
                *("--victim", str(victim)),
                *("--victim-url", hospital),
                *gateways,
                *data,
                *("--limit", str(limit)),
                *("--results", str(results)),
            ],
            log,
        )
    if masks:
        shown = ["--victim", str(victim), "--artifact", str(out / "local"), *data, "--out", str(out / GRID_NAME)]
        run_verb("training.grid", shown, log)
    try:
        run_verb("training.samples", ["--victim", str(victim), *data, "--out", str(out / SAMPLES_NAME)], log)
    except ProcessFailed:  # a victim too bad to be attacked has none; all that was measured stands
        logger.warning("there are no samples for the gateway's page")
    run_verb("training.report", [str(out), "--results", str(results)], log)
    print_next_steps(out, results, data, time.monotonic() - begun, config.task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
