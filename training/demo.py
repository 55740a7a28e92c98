"""The main job, end to end, with real processes that talk HTTP: a black box, its defense, attacks, and one table.

    python -m training.demo --data phantom --out artifacts
    python -m training.demo --data DIR --out artifacts --max-queries 200000

Run again after an interruption, it goes on where it stopped: whatever is finished below OUT/<data set> is used again;
a larger --max-queries continues the learned defenses.
"""

import argparse
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

from defense.artifact import MANIFEST_FILE, load_artifact
from defense.files import replace_file
from training import pretrain
from training.command import cli
from training.command.errors import UserError
from training.command.subprocesses import ProcessFailed, run_verb, service
from training.data.config import PHANTOM, Task
from training.data.datasets import dataset_name, settle
from training.fit.checkpoint import Journal
from training.report import NAME as REPORT_FILE
from training.victim.files import EXAMPLE_NAME, REPORT_NAME

logger = logging.getLogger(__name__)

GRID_NAME: Final = "grid.png"

SAMPLES_NAME: Final = "samples"
"""Below the demo's folder: images for the gateway's page."""

_METHODS: Final[dict[Task, dict[str, str]]] = {
    # At 4096 dimensions, as many queries spent on fewer directions and more images teach more (docs/experiments.md).
    "classification": {"zo-ds": "zo-ds", "zo-ae-ds": "zo-ae-ds-rge20"},
    "segmentation": {"zo-ds": "zo-ds", "local": "local"},
}
"""The learned defenses of each task, by name, with the presets that make them."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="everything goes below it")
    parser.add_argument(
        "--epochs", type=cli.positive_int, help="of the victim (default: 16 for phantom masks, else victim_fit's)"
    )
    parser.add_argument("--pretrain-steps", type=cli.positive_int, help="default: 600 for phantoms, else 1200")
    parser.add_argument(
        "--max-queries", type=cli.positive_int, help="for each defense; default: 15000 for phantoms, else 100000"
    )
    parser.add_argument(
        "--limit", type=cli.positive_int, help="test images attacked; default: 150 for phantoms (masks: 50), else 300"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    # SIGTERM unwinds like Ctrl-C, so that the services it started are stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return cli.run(_demo, build_parser(), argv)


def _demo(arguments: argparse.Namespace) -> int:
    begun = time.monotonic()
    is_phantom = arguments.data == PHANTOM
    data = _data_flags(arguments)
    settle(arguments)
    masks = is_phantom and arguments.task == "segmentation"  # two sets of phantoms have one name
    out = arguments.out / (dataset_name(arguments.data) + ("-masks" if masks else ""))
    log = out / "commands.log"
    results = arguments.out / "results.json"
    max_queries = arguments.max_queries or (15_000 if is_phantom else 100_000)
    pretrain_steps = arguments.pretrain_steps or (600 if is_phantom else 1200)
    epochs = arguments.epochs or (16 if masks else None)  # the U-Net's own default takes longer than all the rest
    limit = arguments.limit or (300 if not is_phantom else 50 if masks else 150)
    _claim(out, {"data": data, "epochs": epochs, "pretrain_steps": pretrain_steps})
    with ExitStack() as stack:
        victim = _victim(epochs, data, out, log)
        hospital = stack.enter_context(service("services.hospital", ["--model", str(victim)], out / "hospital.log"))
        pretrained = _pretrained(data, pretrain_steps, out, log)
        defenses = {"mse": pretrained / "denoiser"}
        for name, preset in _METHODS[arguments.task].items():
            defenses[name] = out / name
            fixed = [*data, "--pretrained", str(pretrained), "--preset", preset]
            _learn(hospital, fixed, max_queries, out / name, log)
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
    if arguments.task == "segmentation":
        shown = ["--victim", str(victim), "--artifact", str(out / "local"), *data, "--out", str(out / GRID_NAME)]
        run_verb("training.grid", shown, log)
    try:
        run_verb("training.samples", ["--victim", str(victim), *data, "--out", str(out / SAMPLES_NAME)], log)
    except ProcessFailed:  # a victim too bad to be attacked has none; all that was measured stands
        logger.warning("there are no samples for the gateway's page")
    run_verb("training.report", [str(out), "--results", str(results)], log)
    _print_next_steps(out, results, data, time.monotonic() - begun, arguments.task)
    return 0


def _data_flags(arguments: argparse.Namespace) -> list[str]:
    """The arguments that all verbs share, as typed; those that have their default are left out."""
    defaults = build_parser()
    flags = ["--data", arguments.data]
    for name in ("task", "size", "channels", "split_seed", "seed"):
        value = getattr(arguments, name)
        if value != defaults.get_default(name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return [*flags, "--published-test"] if arguments.published_test else flags


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes in `out` with which settings its parts are made, and refuses to mix them with others.

    Raises:
        UserError: The parts that are there were made with other settings.
    """
    path = out / "demo.json"
    now = json.dumps(settings)
    if not path.exists():
        replace_file(path, f"{now}\n".encode())
    elif (before := path.read_text().strip()) != now:
        raise UserError(
            f"{out} was made with other settings ({before}, now {now}): "
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
    if all((folder / name / MANIFEST_FILE).exists() for name in pretrain.SANITIZERS):
        logger.info("the sanitizers in %s are used again", folder)
    else:
        run_verb("training.pretrain", [*data, "--pretrain-steps", str(steps), "--out", str(folder)], log)
    return folder


def _learn(hospital: str, fixed: list[str], max_queries: int, out: Path, log: Path) -> None:
    """Learns a defense from the hospital's answers; goes on with what is there, if that spent less."""
    budget = ["--max-queries", str(max_queries)]
    if (out / MANIFEST_FILE).exists():
        learned = load_artifact(out).manifest.provenance.settings["max_queries"]
        if isinstance(learned, int) and learned >= max_queries:
            logger.info("the defense in %s is used again", out)
            return
    resume = ["--resume"] if Journal.total(out) else []
    run_verb("training.zo_fit", ["--victim-url", hospital, *fixed, *budget, "--out", str(out), *resume], log)


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
