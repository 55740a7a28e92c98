r"""Compares defenses at equal numbers of victim queries, and prints and plots what they certify.

    python -m training.compare --victim-url http://127.0.0.1:8000 --data DIR --pretrained artifacts/pretrained \
        --budgets 40000,100000 --seeds 0,1,2 --out artifacts/compare
    python -m training.compare --victim artifacts/victim --data DIR --pretrained artifacts/pretrained \
        --methods noise,mse,zo-ds,fo-ds --out OUT
    python -m training.compare --out OUT --summary

The methods are those of `training.comparison.methods`. What needs training is trained by `training.zo_fit`, one run a
method, budget and seed; then every run is certified on the same images under the same noise. Given again after an
interruption, the command goes on where it was; several processes may share one OUT, and take no run that another one is
at. The summary (results.json, table.md, certified.png, queries.png) is made from everything that is finished in OUT.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import JsonValue

from defense.artifact import MANIFEST_FILE, load_artifact
from defense.preprocessors import PREPROCESSORS
from services.device import resolve_device
from services.protocol.client import HTTPVictim
from training import pretrain, zo_fit
from training.certificates.certification import add_certificate_arguments, certify_images, settle_certificate
from training.certificates.files import Settings, read_output
from training.command import cli
from training.command.errors import UserError
from training.comparison.claims import claim, locked
from training.comparison.fitting import check_flags, learn
from training.comparison.methods import METHODS, method_list
from training.comparison.runs import Record, Run, build_front, certificates_path, finished, plan
from training.comparison.summary import CLAIM, summarize
from training.data.datasets import ImageSet, Splits, load_data
from training.fit.checkpoint import Journal
from training.fit.probe import add_answer_arguments, answer_options
from training.measure.endpoints import PATIENCE_S, Defended, Endpoint, identify
from training.measure.results import NO_DEFENSE
from training.measure.scoring import main_score
from training.measure.selection import chosen_images
from training.victim.in_process import connecting, in_process, refuse_another_victim

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What all runs of one command share.

    Attributes:
        arguments: The command's.
        shared: Settings of the certificates; each run puts in its name and artifact.
        indices: Places of the images in their split.
        chosen: The images.
        endpoint: The bare victim.
        device: Where sanitizers run.
    """

    arguments: argparse.Namespace
    shared: Settings
    indices: list[int]
    chosen: ImageSet
    endpoint: Endpoint
    device: torch.device

    def measure(self, run: Run) -> None:
        """Measures the clean score of a run, and certifies what its file lacks."""
        begun = time.monotonic()
        arguments = self.arguments
        front, artifact = build_front(run, arguments.out, arguments.pretrained, self.device)
        made = None if artifact is None else artifact.manifest.id
        if (before := finished(arguments.out, run, len(self.indices))) and before.artifact == made:
            logger.info("%s: measured before", run)
            return
        defended = Defended(front, self.endpoint, self.device)
        clean = main_score(defended(self.chosen.images).argmax(dim=1), self.chosen.labels).tolist()
        Record(
            run=run,
            white_box=METHODS[run.method].white_box,
            victim="in process" if arguments.victim else "over HTTP",
            artifact=made,
            queries=0 if artifact is None else artifact.manifest.queries_spent,
            clean=list(zip(self.indices, clean, strict=True)),
        ).save(arguments.out)
        told = f"clean {100 * sum(clean) / len(clean):.1f}%"
        if run.method != NO_DEFENSE:
            settings = replace(self.shared, name=str(run), artifact=made)
            path = certificates_path(arguments.out, run)
            lines = certify_images(defended, self.chosen, self.indices, path, settings)
            told += f", certified {100 * sum(line.score for line in lines) / len(lines):.1f}%"
        logger.info("%s: measured in %.0f s: %s", run, time.monotonic() - begun, told)


def main(argv: Sequence[str] | None = None, *, connect: zo_fit.Connect = HTTPVictim) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the client of a victim's URLs; tests pass one without sockets.

    Returns:
        The exit code: 0 when all runs are finished, 2 when one could not be learned.
    """
    return cli.run(partial(_compare, connect=connect), build_parser(), argv)


def _compare(arguments: argparse.Namespace, connect: zo_fit.Connect) -> int:
    if arguments.summary:
        return summarize(arguments)
    names = arguments.methods or [name for name in METHODS if arguments.victim or not METHODS[name].white_box]
    runs = plan(names, arguments.budgets, arguments.seeds, arguments.fo_steps)
    _refuse_impossible(arguments, runs)
    if arguments.dry_run:
        for run in runs:
            bound = f"{run.steps} steps" if run.steps else f"{run.budget:,} queries"
            print(f"{run!s:<32} {bound:>16}  {_state(run, arguments.out)}")
        return 0
    device = resolve_device(arguments.device)
    splits = load_data(arguments)
    indices, chosen = chosen_images(splits, arguments.split, arguments.limit, arguments.seed)
    settle_certificate(arguments, chosen)
    opened: AbstractContextManager[Endpoint]
    if arguments.victim:
        opened = in_process(arguments.victim, device, splits)
    else:
        opened = connect(arguments.victim_url, patience_s=PATIENCE_S, **answer_options(arguments))
    failed = []
    with opened as endpoint:
        where = str(arguments.victim or ", ".join(arguments.victim_url))
        if identify(endpoint, where, chosen.images[0], splits.labels).artifact is not None:
            raise UserError(f"a gateway answers at {where}: name the bare victim")
        channels, height, width = chosen.images.shape[1:]
        shared = Settings(
            name="",
            artifact=None,
            dataset=splits.name,
            fingerprint=splits.fingerprint,
            split=arguments.split,
            shape=(channels, height, width),
            stop_early=not arguments.no_stop_early and arguments.tau is None,
            **{name: getattr(arguments, name) for name in ("sigma", "n0", "n", "alpha", "tau", "seed")},
        )
        _claim(arguments, shared, endpoint, splits, chosen)
        learner = connecting(endpoint) if arguments.victim else connect
        bench = Bench(arguments, shared, indices, chosen, endpoint, device)
        for run in runs:
            with locked(arguments.out / "locks" / f"{run}.lock".replace("/", "-"), wait=False) as mine:
                if not mine:
                    logger.info("%s: another process is at it, so it is left to that one", run)
                elif METHODS[run.method].kind == "learned" and not learn(run, arguments, splits.fingerprint, learner):
                    failed.append(str(run))
                    if not endpoint.ready():
                        raise UserError(f"nothing is ready at {where}: start it, and give the same command again")
                else:
                    bench.measure(run)
    summarize(arguments)
    if failed:
        print(f"not learned, for the reasons above: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def _refuse_impossible(arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Raises UserError for what would else fail only after hours."""
    if (arguments.victim is None) == (not arguments.victim_url):
        raise UserError("name the victim: either --victim-url URL, or --victim DIR")
    white = sorted({run.method for run in runs if METHODS[run.method].white_box})
    if white and not arguments.victim:
        raise UserError(f"{', '.join(white)} needs the victim's gradient, which no URL gives: use --victim DIR")
    parts = {METHODS[run.method].part for run in runs} - {"", *PREPROCESSORS}
    if any(METHODS[run.method].kind == "learned" for run in runs):
        parts |= set(pretrain.SANITIZERS)
    if parts and arguments.pretrained is None:
        raise UserError(
            "these methods start from pre-trained parts: make some with training.pretrain, and name them "
            "with --pretrained"
        )
    for run in runs:
        if METHODS[run.method].kind == "learned":
            check_flags(run, arguments)


def _state(run: Run, out: Path) -> str:
    """How far a run is, in words."""
    lines = read_output(certificates_path(out, run))
    images = json.loads((out / CLAIM).read_bytes())["images"] if (out / CLAIM).exists() else 0
    if images and finished(out, run, images):
        return "done"
    if lines:
        return f"{len(lines)} of {images} images certified"
    if (out / run.place / MANIFEST_FILE).exists():
        return "learned"
    spent = Journal.total(out / run.place)
    return f"{spent:,} queries spent" if spent else "to do"


def _claim(
    arguments: argparse.Namespace, shared: Settings, endpoint: Endpoint, splits: Splits, chosen: ImageSet
) -> None:
    """Refuses to mix runs of other settings, other pre-trained parts or another victim in one folder."""
    ids = {}
    if arguments.pretrained:
        for name in pretrain.SANITIZERS:
            pretrain.load(arguments.pretrained, name, splits, arguments.sigma)  # refuses what does not fit
            ids[name] = load_artifact(arguments.pretrained / name).manifest.id
    notes: dict[str, JsonValue] = {**asdict(shared), "shape": list(shared.shape), "images": len(chosen), **ids}
    claim(arguments.out / CLAIM, notes)
    refuse_another_victim(arguments.out / "victim.json", endpoint, chosen.images)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__.partition("\n")[0])
    cli.add_data_arguments(parser)  # its --seed decides the images and their noise
    cli.add_device_argument(parser)
    add_certificate_arguments(parser, n=1000, radii=[0.0, 0.25, 0.5])
    add = parser.add_argument
    add("--victim-url", action="append", default=[], help="the black box, as zo_fit has it; repeat it for replicas")
    add_answer_arguments(parser)
    add("--victim", type=Path, help="the victim's folder instead: it runs in this process; white-box methods need it")
    add("--pretrained", type=Path, help="what training.pretrain wrote")
    add("--methods", type=method_list, help=f"comma-separated, of {', '.join(METHODS)} (all that the victim permits)")
    add("--budgets", type=_budgets, default=[40_000], help="comma-separated victim queries a run (40000)")
    add("--seeds", type=_seeds, default=[0], help="comma-separated seeds of the training (0)")
    add("--fo-steps", type=cli.positive_int, default=800, help="steps of the white-box methods (default 800)")
    add("--reference", choices=METHODS, default="mse", help="what the others are compared with (default mse)")
    add("--split", choices=("test", "validation"), default="test", help="images to measure on (default test)")
    add("--limit", type=cli.positive_int, default=300, help="at most so many of them, stratified (default 300)")
    add("--no-stop-early", action="store_true", help="spend the n samples also where the n0 samples show no hope")
    add("--out", type=Path, default=Path("artifacts/compare"), help="everything goes below it")
    add("--dry-run", action="store_true", help="print the runs and how far they are; do nothing")
    add("--summary", action="store_true", help="only make the summary of what is finished in OUT")
    return parser


def _seeds(text: str) -> list[int]:
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def _budgets(text: str) -> list[int]:
    return sorted({cli.positive_int(part) for part in text.split(",")})


if __name__ == "__main__":
    sys.exit(main())
