"""The main job, end to end, with real processes that talk HTTP: a black box, its defence, attacks, and one table.

    python -m training.demo --data phantom --out artifacts
    python -m training.demo --data DIR --out artifacts --max-queries 100000

Run again after an interruption, it goes on where it stopped: whatever is finished below OUT/<data set> is used again.
"""

import argparse
import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from defense.artifact import MANIFEST_FILE
from training import cli, pretrain
from training.checkpoint import FILE_NAME as CHECKPOINT_FILE
from training.datasets import PHANTOM, dataset_name
from training.processes import ProcessFailed, run_verb, service

logger = logging.getLogger(__name__)

_METHODS: Final = {"zo-ds": "denoiser", "zo-ae-ds": "denoiser+autoencoder"}
"""The learned defences, by name, with the sanitizer that makes them."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("artifacts"), help="everything goes below it")
    parser.add_argument("--epochs", type=cli.positive_int, help="of the victim (default: victim_fit's)")
    parser.add_argument("--pretrain-steps", type=cli.positive_int, help="default: 600 for phantoms, else 1200")
    parser.add_argument(
        "--max-queries", type=cli.positive_int, help="for each defence; default: 15000 for phantoms, else 40000"
    )
    parser.add_argument(
        "--limit", type=cli.positive_int, help="test images attacked; default: 150 for phantoms, else 300"
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
    out = arguments.out / dataset_name(arguments.data)
    out.mkdir(parents=True, exist_ok=True)
    data = [
        *("--data", arguments.data),
        *("--size", str(arguments.size)),
        *("--channels", str(arguments.channels)),
        *("--seed", str(arguments.seed)),
        *(["--published-test"] if arguments.published_test else []),
    ]
    pretrain_steps = arguments.pretrain_steps or (600 if is_phantom else 1200)
    max_queries = arguments.max_queries or (15_000 if is_phantom else 40_000)
    limit = arguments.limit or (150 if is_phantom else 300)
    log = out / "commands.log"
    try:
        with ExitStack() as stack:
            victim = _victim(arguments, data, out, log)
            hospital = stack.enter_context(service("services.hospital", ["--model", str(victim)], out / "hospital.log"))
            pretrained = _pretrained(data, pretrain_steps, out, log)
            defences = {"mse": pretrained / "denoiser"}
            for name, sanitizer in _METHODS.items():
                defences[name] = out / name
                resume = ["--resume"] if (out / name / CHECKPOINT_FILE).exists() else []
                run_verb(
                    "training.zo_fit",
                    [
                        *("--victim-url", hospital),
                        *data,
                        *("--pretrained", str(pretrained)),
                        *("--sanitizer", sanitizer),
                        *("--max-queries", str(max_queries)),
                        *("--out", str(out / name)),
                        *resume,
                    ],
                    log,
                )
            gateways: list[str] = []
            for name, artifact in defences.items():
                flags = ["--artifact", str(artifact), "--victim-url", hospital]
                url = stack.enter_context(service("services.gateway", flags, out / f"gateway-{name}.log"))
                gateways += ["--gateway", f"{name}={url}"]
            results = arguments.out / "results.json"
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
    except ProcessFailed as error:
        raise cli.UserError(str(error)) from error
    _print_next_steps(victim, out, results, arguments, time.monotonic() - begun)
    return 0


def _victim(arguments: argparse.Namespace, data: list[str], out: Path, log: Path) -> Path:
    """Trains the victim, unless it is there."""
    victim = out / "victim"
    if (victim / "report.json").exists():
        logger.info("the victim in %s is used again", victim)
    else:
        epochs = ["--epochs", str(arguments.epochs)] if arguments.epochs else []
        run_verb("training.victim_fit", [*data, "--out", str(victim), *epochs], log)
    return victim


def _pretrained(data: list[str], steps: int, out: Path, log: Path) -> Path:
    """Pre-trains the sanitizers, unless they are there."""
    folder = out / "pretrained"
    if all((folder / name / MANIFEST_FILE).exists() for name in pretrain.SANITIZERS):
        logger.info("the sanitizers in %s are used again", folder)
    else:
        run_verb("training.pretrain", [*data, "--pretrain-steps", str(steps), "--out", str(folder)], log)
    return folder


def _print_next_steps(victim: Path, out: Path, results: Path, arguments: argparse.Namespace, seconds: float) -> None:
    defence = out / "zo-ds"
    print(f"""
Done in {seconds / 60:.1f} minutes. Everything is below {out}; the rows are in {results}.
Rows: `none` is the bare model; `mse` a denoiser that cost no query; `zo-ds` and `zo-ae-ds` learned from queries.
The attacker above knows the model, not the gateway: that is the weakest rung of the threat ladder.

To try next (in .venv; each service keeps its terminal):
  python -m services.hospital --model {victim} --port 8000
  python -m services.gateway --artifact {defence} --victim-url http://127.0.0.1:8000 --port 8080
  curl -F file=@scan.png http://127.0.0.1:8080/predict
  python -m training.certify --url http://127.0.0.1:8080 --name zo-ds --data {shlex.quote(arguments.data)} --limit 20
  python -m training.zo_fit --victim-url http://127.0.0.1:8000 --data {shlex.quote(arguments.data)} \\
      --pretrained {out / "pretrained"} --sanitizer denoiser --max-queries 100000 --out {out / "zo-ds-100k"}""")


if __name__ == "__main__":
    sys.exit(main())
