"""The stages of the demo: commands that are run unless what they make is there."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any, Final

from defense.artifact import MANIFEST_FILE, load_artifact
from defense.files import replace_file
from services.settings import flags_of
from training.command.errors import UserError
from training.command.subprocesses import run_verb
from training.data.config import Task
from training.fit.config import RunConfig
from training.fit.presets import PRESETS, PresetName
from training.fit.pretraining import SANITIZERS
from training.reporting import FILE_NAME as REPORT_FILE
from training.victim.files import EXAMPLE_NAME, REPORT_NAME

logger = logging.getLogger(__name__)

GRID_NAME: Final = "grid.png"

SAMPLES_NAME: Final = "samples"
"""Below the demo's folder: images for the gateway's page."""

METHODS: Final[dict[Task, dict[str, PresetName]]] = {
    # At 4096 dimensions, as many queries spent on fewer directions and more images teach more (docs/experiments.md).
    "classification": {"zo-ds": "zo-ds", "zo-ae-ds": "zo-ae-ds-rge20"},
    "segmentation": {"zo-ds": "zo-ds", "local": "local"},
}
"""The learned defenses of each task, by name, with the presets that make them."""


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Records in `out` the settings of its parts; UserError if the parts there were made with other settings."""
    path = out / "demo.json"
    if not path.exists():
        replace_file(path, f"{json.dumps(settings)}\n".encode())
    before = json.loads(path.read_text())
    if {**before, "data": sorted(before["data"])} != {**settings, "data": sorted(settings["data"])}:
        raise UserError(
            f"{out} was made with other settings ({json.dumps(before)}, now {json.dumps(settings)}): "
            "use the same, name another --out, or remove that folder"
        )


def train_victim(epochs: int | None, data: list[str], out: Path, log: Path) -> Path:
    """Trains the victim, unless it is there."""
    victim = out / "victim"
    if (victim / REPORT_NAME).exists():
        logger.info("the victim in %s is used again", victim)
    else:
        more = ["--epochs", str(epochs)] if epochs else []
        run_verb("training.victim_fit", [*data, "--out", str(victim), *more], log)
    return victim


def pretrain(data: list[str], steps: int, out: Path, log: Path) -> Path:
    """Pre-trains the sanitizers, unless they are there."""
    folder = out / "pretrained"
    if all((folder / name / MANIFEST_FILE).exists() for name in SANITIZERS):
        logger.info("the sanitizers in %s are used again", folder)
    else:
        run_verb("training.pretrain", [*data, "--pretrain-steps", str(steps), "--out", str(folder)], log)
    return folder


def learn(config: RunConfig, log: Path) -> None:
    """Learns a defense from the hospital's answers; goes on with what is there, if that spent less."""
    if (config.out / MANIFEST_FILE).exists():
        learned = load_artifact(config.out).manifest.provenance.settings["max_queries"]
        if isinstance(learned, int) and learned >= config.max_queries:
            logger.info("the defense in %s is used again", config.out)
            return
    assert config.preset is not None
    run_verb("training.zo_fit", flags_of(config, {**PRESETS[config.preset], "data": None}), log)


def print_next_steps(out: Path, results: Path, data: list[str], seconds: float, task: Task) -> None:
    """Prints where everything is, and what can be tried with it."""
    same_data = shlex.join(data)
    name, *others = reversed(METHODS[task])
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
