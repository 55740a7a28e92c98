"""The main job, end to end, with real processes that talk HTTP: a black box, its defense, attacks, and one table.

    python -m training.demo --data phantom --out artifacts
    python -m training.demo --data DIR --out artifacts --max-queries 200000

Run again after an interruption, it goes on where it stopped: whatever is finished below OUT/<data set> is used again;
a larger --max-queries continues the learned defenses.
"""

import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from pydantic import Field, PositiveInt

from defense.artifact import MANIFEST_FILE, load_artifact
from defense.files import replace_file
from services.settings import flags_of
from training.command.errors import UserError
from training.command.subprocesses import ProcessFailed, run_verb, service
from training.command.verb import run
from training.data.config import PHANTOM, DataConfig, Task
from training.data.datasets import dataset_name, settled
from training.fit.checkpoint import Journal
from training.fit.config import RunConfig
from training.fit.presets import PRESETS, PresetName
from training.fit.pretraining import SANITIZERS
from training.report import NAME as REPORT_FILE
from training.victim.files import EXAMPLE_NAME, REPORT_NAME

logger = logging.getLogger(__name__)

GRID_NAME: Final = "grid.png"

SAMPLES_NAME: Final = "samples"
"""Below the demo's folder: images for the gateway's page."""

_METHODS: Final[dict[Task, dict[str, PresetName]]] = {
    # At 4096 dimensions, as many queries spent on fewer directions and more images teach more (docs/experiments.md).
    "classification": {"zo-ds": "zo-ds", "zo-ae-ds": "zo-ae-ds-rge20"},
    "segmentation": {"zo-ds": "zo-ds", "local": "local"},
}
"""The learned defenses of each task, by name, with the presets that make them."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # SIGTERM unwinds like Ctrl-C, so that the services it started are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run(_demo, DemoConfig, argv, prog="python -m training.demo")


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
    _claim(out, {"data": data, "epochs": epochs, "pretrain_steps": pretrain_steps})
    with ExitStack() as stack:
        victim = _victim(epochs, data, out, log)
        hospital = stack.enter_context(service("services.hospital", ["--model", str(victim)], out / "hospital.log"))
        pretrained = _pretrained(data, pretrain_steps, out, log)
        defenses = {"mse": pretrained / "denoiser"}
        for name, preset in _METHODS[config.task].items():
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
            _learn(learning, log)
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
    _print_next_steps(out, results, data, time.monotonic() - begun, config.task)
    return 0


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes in `out` with which settings its parts are made, and refuses to mix them with others.

    Raises:
        UserError: The parts that are there were made with other settings.
    """
    path = out / "demo.json"
    if not path.exists():
        replace_file(path, f"{json.dumps(settings)}\n".encode())
    before = json.loads(path.read_text())
    if {**before, "data": sorted(before["data"])} != {**settings, "data": sorted(settings["data"])}:
        raise UserError(
            f"{out} was made with other settings ({json.dumps(before)}, now {json.dumps(settings)}): "
            "use the same, name another --out, or remove that folder"
        )


def _victim(epochs: int | None, data: list[str], out: Path, log: Path) -> Path:
    """Trains the victim, unless it is there."""
    victim = out / "victim"
    if (victim / REPORT_NAME).exists():
        logger.info("the victim in %s is used again", victim)
    else:
        more = ["--epochs", str(epochs)] if epochs else []
        run_verb("training.victim_fit", [*data, "--out", str(victim), *more], log)
    return victim


def _pretrained(data: list[str], steps: int, out: Path, log: Path) -> Path:
    """Pre-trains the sanitizers, unless they are there."""
    folder = out / "pretrained"
    if all((folder / name / MANIFEST_FILE).exists() for name in SANITIZERS):
        logger.info("the sanitizers in %s are used again", folder)
    else:
        run_verb("training.pretrain", [*data, "--pretrain-steps", str(steps), "--out", str(folder)], log)
    return folder


def _learn(config: RunConfig, log: Path) -> None:
    """Learns a defense from the hospital's answers; goes on with what is there, if that spent less."""
    if (config.out / MANIFEST_FILE).exists():
        learned = load_artifact(config.out).manifest.provenance.settings["max_queries"]
        if isinstance(learned, int) and learned >= config.max_queries:
            logger.info("the defense in %s is used again", config.out)
            return
    assert config.preset is not None
    run_verb("training.zo_fit", flags_of(config, {**PRESETS[config.preset], "data": None}), log)


def _print_next_steps(out: Path, results: Path, data: list[str], seconds: float, task: Task) -> None:
    same_data = shlex.join(data)
    name, *others = reversed(_METHODS[task])
    learned = " and ".join(f"`{one}`" for one in (*others, name))
    pretrained, defense, other = (shlex.quote(str(out / part)) for part in ("pretrained", name, "surrogate"))
    picture = f"\n{out / GRID_NAME} shows a few images, attacked and sanitized." if task == "segmentation" else ""
    print(f"""
Done in {seconds / 60:.1f} minutes. Everything is below {out}; the rows are in {results}.{picture}
The report, to read in a browser: {out / REPORT_FILE}
Rows: `none` is the bare model; `mse` a denoiser that cost no query; {learned} learned from queries.
The attacker above knows the model, not the gateway: that is the weakest rung of the threat ladder.

To try next (in .venv; each service keeps its terminal):
  python -m services.hospital --model {shlex.quote(str(out / "victim"))} --port 8000
  python -m services.gateway --artifact {defense} --victim-url http://127.0.0.1:8000 --port 8080 \\
      --page-samples {shlex.quote(str(out / SAMPLES_NAME))} --page-compare
  open http://127.0.0.1:8080/       # images, attacked ones too, before and after the sanitizer
  curl -F file=@{shlex.quote(str(out / "victim" / EXAMPLE_NAME))} http://127.0.0.1:8080/predict
  python -m training.certify --url http://127.0.0.1:8080 --name {name} {same_data} --limit 20
  python -m training.zo_fit --victim-url http://127.0.0.1:8000 {same_data} \\
      --pretrained {pretrained} --preset surrogate --max-queries 100000 --out {other}""")


if __name__ == "__main__":
    sys.exit(main())
